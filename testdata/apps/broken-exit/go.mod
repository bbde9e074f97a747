module example.com/broken-exit

go 1.26.8

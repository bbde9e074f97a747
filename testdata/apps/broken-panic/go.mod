module example.com/broken-panic

go 1.26.8

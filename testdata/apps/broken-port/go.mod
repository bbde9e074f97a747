module example.com/broken-port

go 1.26.8

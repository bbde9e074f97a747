module example.com/broken-compile

go 1.26.8

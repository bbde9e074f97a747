module example.com/hello-volume

go 1.26.8

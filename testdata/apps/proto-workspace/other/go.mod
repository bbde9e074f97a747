module example.com/proto-workspace/other

go 1.26.8

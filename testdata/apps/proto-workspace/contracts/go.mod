module example.com/proto-workspace/contracts

go 1.26.8

module example.com/workspace/jobs

go 1.26

module example.com/no-main

go 1.26.8

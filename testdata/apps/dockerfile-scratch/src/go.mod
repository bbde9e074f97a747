module example.com/dockerfile-scratch

go 1.26

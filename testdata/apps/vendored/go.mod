module example.com/vendored

go 1.26

require example.com/away v1.0.0

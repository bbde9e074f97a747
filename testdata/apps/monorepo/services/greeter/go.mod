module example.com/monorepo/services/greeter

go 1.26

require example.com/monorepo/pkg v0.0.0

replace example.com/monorepo/pkg => ../../pkg

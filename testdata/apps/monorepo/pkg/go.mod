module example.com/monorepo/pkg

go 1.26

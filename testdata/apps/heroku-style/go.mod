module example.com/heroku-style

// +heroku goVersion 1.26
// +heroku install ./web ./release

go 1.26

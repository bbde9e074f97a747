// Greeter is one service of a repository of many; it replaces a module by its folder.
package main

import (
	"fmt"
	"log"
	"net/http"
	"os"

	"example.com/monorepo/pkg"
)

func main() {
	http.HandleFunc("GET /", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, pkg.Greeting) })
	log.Fatal(http.ListenAndServe(addr(), nil))
}

func addr() string {
	if p := os.Getenv("PORT"); p != "" {
		return ":" + p
	}
	return ":8080"
}

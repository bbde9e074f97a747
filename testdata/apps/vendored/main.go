// Vendored builds with nothing but what is in its vendor folder.
package main

import (
	"fmt"
	"log"
	"net/http"
	"os"

	"example.com/away"
)

func main() {
	http.HandleFunc("GET /", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, away.Name) })
	log.Fatal(http.ListenAndServe(addr(), nil))
}

func addr() string {
	if p := os.Getenv("PORT"); p != "" {
		return ":" + p
	}
	return ":8080"
}

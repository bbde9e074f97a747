// Stamped shows what a build put into it: flags, tags and the commit.
package main

import (
	"fmt"
	"log"
	"net/http"
	"os"
)

var version, commit, date, edition string

func main() {
	http.HandleFunc("GET /", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "stamped", tier, edition, version, commit, date)
	})
	log.Fatal(http.ListenAndServe(addr(), nil))
}

func addr() string {
	if p := os.Getenv("PORT"); p != "" {
		return ":" + p
	}
	return ":8080"
}

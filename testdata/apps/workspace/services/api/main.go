// Api is the web service of a workspace of three modules.
package main

import (
	"fmt"
	"log"
	"net/http"
	"os"

	"example.com/workspace/lib"
)

func main() {
	http.HandleFunc("GET /", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, lib.Name) })
	log.Fatal(http.ListenAndServe(addr(), nil))
}

func addr() string {
	if p := os.Getenv("PORT"); p != "" {
		return ":" + p
	}
	return ":8080"
}

// Server is what the Dockerfile puts into an empty image. Build it first, into
// the folder above: CGO_ENABLED=0 go build -o ../server .
package main

import (
	"flag"
	"fmt"
	"log"
	"net/http"
	"os"
)

func main() {
	addr := flag.String("addr", ":8080", "where to listen")
	flag.Parse()
	http.HandleFunc("GET /", func(w http.ResponseWriter, _ *http.Request) {
		b, err := os.ReadFile("secret.txt")
		fmt.Fprintln(w, os.Getenv("GREETING"), string(b), err)
	})
	log.Fatal(http.ListenAndServe(*addr, nil))
}

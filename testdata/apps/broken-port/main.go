// Broken-port listens on 9999, whatever PORT says.
package main

import (
	"log"
	"net/http"
	"time"
)

func main() {
	srv := &http.Server{Addr: ":9999", Handler: http.NotFoundHandler(), ReadHeaderTimeout: 10 * time.Second}
	log.Printf("serving on %s", srv.Addr)
	log.Fatal(srv.ListenAndServe())
}

// Pages renders templates and serves files that are in its image beside it.
package main

import (
	"html/template"
	"log"
	"net/http"
	"os"
)

func main() {
	index := template.Must(template.ParseFiles("templates/index.html"))
	http.Handle("GET /static/", http.FileServerFS(os.DirFS(".")))
	http.Handle("GET /migrations/", http.FileServerFS(os.DirFS(".")))
	http.HandleFunc("GET /healthz", func(http.ResponseWriter, *http.Request) {})
	http.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) { _ = index.Execute(w, "pages") })
	log.Fatal(http.ListenAndServe(addr(), nil))
}

func addr() string {
	if p := os.Getenv("PORT"); p != "" {
		return ":" + p
	}
	return ":8080"
}

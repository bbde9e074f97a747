// Hello-volume keeps notes in a file of the directory /data, which has to be a
// volume: m3o storage:create data; m3o storage:mount data /data.
//
//	GET /            the notes, one a line
//	POST /?note=X    adds one
//	GET /healthz     200
//
// It holds a lock on the file and exits when another process does.
package main

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"syscall"
)

const version = "version 1"

func main() {
	http.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprintln(w, "ok") })
	f, err := os.OpenFile("/data/notes", os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err == nil {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	}
	if err != nil {
		log.Printf("no notes: %v", err)
		if !os.IsNotExist(err) {
			os.Exit(4)
		}
	}
	http.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		if f == nil {
			http.Error(w, "there is no volume at /data", http.StatusNotFound)
			return
		}
		_, _ = io.Copy(w, io.NewSectionReader(f, 0, 1<<20))
	})
	http.HandleFunc("POST /{$}", func(w http.ResponseWriter, r *http.Request) {
		if f == nil {
			http.Error(w, "there is no volume at /data", http.StatusNotFound)
			return
		}
		if _, err := fmt.Fprintln(f, r.FormValue("note")); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
	log.Printf("%s serves", version)
	log.Fatal(http.ListenAndServe(":"+os.Getenv("PORT"), nil))
}

// Chi-notes is a REST service with chi: notes that are kept in memory.
package main

import (
	"encoding/json"
	"log"
	"net/http"
	"os"
	"sync"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
)

// Set by the build to the commit's first digits.
var version = "dev"

type store struct {
	mu    sync.Mutex
	notes map[string]string
}

func main() {
	s := &store{notes: map[string]string{"hello": "chi-notes"}}
	r := chi.NewRouter()
	r.Use(middleware.RequestID, middleware.Recoverer)
	r.Get("/", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("chi-notes " + version + "\n")) })
	r.Route("/notes/{name}", func(r chi.Router) {
		r.Get("/", s.get)
		r.Put("/", s.put)
	})
	log.Fatal(http.ListenAndServe(addr(), r))
}

func (s *store) get(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	text, ok := s.notes[chi.URLParam(r, "name")]
	if !ok {
		http.Error(w, "no such note", http.StatusNotFound)
		return
	}
	_ = json.NewEncoder(w).Encode(map[string]string{"text": text})
}

func (s *store) put(w http.ResponseWriter, r *http.Request) {
	var note struct{ Text string }
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10)).Decode(&note); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.notes[chi.URLParam(r, "name")] = note.Text
	w.WriteHeader(http.StatusNoContent)
}

func addr() string {
	if p := os.Getenv("PORT"); p != "" {
		return ":" + p
	}
	return ":8080"
}

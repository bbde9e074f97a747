// Hello-http is a plain web server without dependencies, on the port that
// PORT names.
//
//	GET /            the version
//	GET /healthz     200
//	GET /slow?ms=N   answers after N milliseconds, at most a minute
//	GET /stream      server-sent events, one every 100 ms; ?count=N, 10 when absent
//	GET /env?name=X  the variable X, 404 when it is not set
//	GET /crash       ends the process with status 3
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// version is the answer of /: change it to tell one release from the next.
const version = "version 1"

func main() {
	if err := serve(); err != nil {
		log.Fatal(err)
	}
}

func serve() error {
	port := os.Getenv("PORT")
	if port == "" {
		port = "8080"
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprintln(w, version) })
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /slow", slow)
	mux.HandleFunc("GET /stream", stream)
	mux.HandleFunc("GET /env", env)
	mux.HandleFunc("GET /crash", func(http.ResponseWriter, *http.Request) {
		log.Print("crashing as asked")
		os.Exit(3)
	})
	srv := &http.Server{Addr: ":" + port, Handler: logged(mux), ReadHeaderTimeout: 10 * time.Second}

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	stopped := make(chan error, 1)
	go func() {
		<-ctx.Done()
		log.Print("stopping: no new requests, open ones finish")
		// The platform ends the process after its grace period, so there is
		// no need for a limit here.
		stopped <- srv.Shutdown(context.Background())
	}()
	log.Printf("%s serves on %s", version, srv.Addr)
	if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	err := <-stopped
	log.Print("stopped")
	return err
}

func logged(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		log.Printf("%s %s", r.Method, r.URL.Path)
		next.ServeHTTP(w, r)
	})
}

// number reads a query parameter between 0 and limit.
func number(r *http.Request, name string, absent, limit int) (int, error) {
	s := r.URL.Query().Get(name)
	if s == "" {
		return absent, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 || n > limit {
		return 0, fmt.Errorf("%s must be a number between 0 and %d", name, limit)
	}
	return n, nil
}

func slow(w http.ResponseWriter, r *http.Request) {
	ms, err := number(r, "ms", 1000, 60_000)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	select {
	case <-time.After(time.Duration(ms) * time.Millisecond):
		_, _ = fmt.Fprintf(w, "%s after %d ms\n", version, ms)
	case <-r.Context().Done():
	}
}

func stream(w http.ResponseWriter, r *http.Request) {
	count, err := number(r, "count", 10, 100_000)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	rc := http.NewResponseController(w)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for n := 1; n <= count; n++ {
		if _, err := fmt.Fprintf(w, "id: %d\ndata: %s\n\n", n, version); err != nil {
			return
		}
		if err := rc.Flush(); err != nil {
			return
		}
		select {
		case <-tick.C:
		case <-r.Context().Done():
			return
		}
	}
}

// env shows a variable, but none whose name sounds secret: this app is open
// to whoever knows its URL.
func env(w http.ResponseWriter, r *http.Request) {
	name := r.URL.Query().Get("name")
	for _, word := range []string{"SECRET", "TOKEN", "KEY", "PASS", "CRED"} {
		if strings.Contains(strings.ToUpper(name), word) {
			http.Error(w, "that name sounds secret", http.StatusForbidden)
			return
		}
	}
	v, ok := os.LookupEnv(name)
	if !ok {
		http.NotFound(w, r)
		return
	}
	_, _ = fmt.Fprintln(w, v)
}

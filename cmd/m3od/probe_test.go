package main

import (
	"fmt"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"
)

// A probe asks an app again and again until it is stopped and counts what
// did not answer 200. It is bounded: a request every few milliseconds.
type probe struct {
	quit  chan struct{}
	wg    sync.WaitGroup
	mu    sync.Mutex // guards what follows
	n     int
	bad   int
	first string // the first failure
}

func startProbe(t *testing.T, b *box, app, path string) *probe {
	t.Helper()
	c := b.client(t)
	url := b.url(app, path)
	return startAsking(t, func() error { return ask(c, url) })
}

// startAsking is startProbe for any way to ask.
func startAsking(t *testing.T, ask func() error) *probe {
	t.Helper()
	p := &probe{quit: make(chan struct{})}
	p.wg.Go(func() {
		for {
			select {
			case <-p.quit:
				return
			case <-time.After(5 * time.Millisecond):
			}
			p.note(ask())
		}
	})
	t.Cleanup(func() { p.stop() })
	return p
}

func (p *probe) note(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.n++
	if err != nil {
		if p.bad == 0 {
			p.first = err.Error()
		}
		p.bad++
	}
}

// stop ends the probe and returns how many requests it made and how many failed.
func (p *probe) stop() (n, bad int) {
	p.mu.Lock()
	select {
	case <-p.quit:
	default:
		close(p.quit)
	}
	p.mu.Unlock()
	p.wg.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.n, p.bad
}

func ask(c *http.Client, url string) error {
	res, err := c.Get(url)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", res.Status, body)
	}
	return nil
}

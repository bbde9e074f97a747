package router

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"
)

// guarded is a guarded connection that has had one request without a body, as
// when net/http serves it.
func guarded(t *testing.T, lim *limits) (c *guardConn, client net.Conn) {
	t.Helper()
	ours, client := net.Pipe()
	t.Cleanup(func() { _, _ = ours.Close(), client.Close() })
	c = newGuard(ours, lim)
	go func() { _, _ = io.WriteString(client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n") }()
	if _, err := c.Read(make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	return c, client
}

// net/http looks for a client that leaves by reading one byte, and interrupts
// that when the answer is out: neither may lose a byte or an end.
func TestLookForAClientThatLeaves(t *testing.T) {
	for name, tc := range map[string]struct {
		after  time.Duration // something happens
		what   func(c *guardConn, client net.Conn)
		n      int
		err    error
		within time.Duration
	}{
		"interrupted soon":   {time.Millisecond, func(c *guardConn, _ net.Conn) { _ = c.SetReadDeadline(time.Unix(1, 0)) }, 0, os.ErrDeadlineExceeded, time.Millisecond},
		"interrupted later":  {time.Second, func(c *guardConn, _ net.Conn) { _ = c.SetReadDeadline(time.Unix(1, 0)) }, 0, os.ErrDeadlineExceeded, time.Second},
		"the client leaves":  {time.Millisecond, func(_ *guardConn, client net.Conn) { _ = client.Close() }, 0, io.EOF, lookAfter},
		"leaves later":       {time.Second, func(_ *guardConn, client net.Conn) { _ = client.Close() }, 0, io.EOF, time.Second},
		"the next request":   {time.Millisecond, func(_ *guardConn, client net.Conn) { _, _ = client.Write([]byte("G")) }, 1, nil, lookAfter},
		"a deadline to come": {time.Millisecond, func(c *guardConn, _ net.Conn) { _ = c.SetReadDeadline(time.Now().Add(time.Second)) }, 0, os.ErrDeadlineExceeded, time.Second + time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, client := guarded(t, Limits{}.withDefaults())
				began := time.Now()
				go func() {
					time.Sleep(tc.after) // of the bubble's clock
					tc.what(c, client)
				}()
				n, err := c.Read(make([]byte, 1))
				if n != tc.n || !errors.Is(err, tc.err) || time.Since(began) > tc.within {
					t.Errorf("got %d, %v after %v; want %d, %v within %v", n, err, time.Since(began), tc.n, tc.err, tc.within)
				}
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					return
				}
				// What was interrupted goes on as if nothing had been.
				_ = c.SetReadDeadline(time.Time{})
				go func() { _, _ = io.WriteString(client, "GET /2 HTTP/1.1\r\nHost: a\r\n\r\n") }()
				b := make([]byte, 4096)
				if n, err := c.Read(b); err != nil || string(b[:7]) != "GET /2 " {
					t.Errorf("then got %q, %v", b[:n], err)
				}
			})
		})
	}
}

// The connection's own deadline may be older than what is wanted: it must end
// no read before its time, and none after.
func TestReadDeadlinesAreMovedOnlyWhenTheyPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, client := guarded(t, Limits{}.withDefaults())
		began := time.Now()
		for range 5 {
			_ = c.SetReadDeadline(time.Now().Add(10 * time.Second)) // of a head
			go func() {
				time.Sleep(9 * time.Second)
				_, _ = io.WriteString(client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
			}()
			if _, err := c.Read(make([]byte, 4096)); err != nil {
				t.Fatalf("a read ended %v after the first began: %v", time.Since(began), err)
			}
			_ = c.SetReadDeadline(time.Time{})
		}
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		began = time.Now()
		if _, err := c.Read(make([]byte, 4096)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) != 10*time.Second {
			t.Errorf("got %v after %v, want a time-out after 10s", err, time.Since(began))
		}
	})
}

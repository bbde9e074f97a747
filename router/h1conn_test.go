package router

import (
	"net"
	"testing"
	"time"
)

// An app that closes idle connections sooner than the router does is learnt
// from: what cannot be repeated gets a new connection where an old one may be
// about to end.
func TestPostsAvoidConnectionsTheAppIsAboutToClose(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	lim := Limits{}.withDefaults()
	e := newEndpoint(releaseID{}, ln.Addr().String(), lim)
	accepted := make(chan net.Conn, 4)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	get := func(careful bool) *h1conn {
		t.Helper()
		c, err := e.h1.get(t.Context(), lim, careful, false)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	idleFor := func(c *h1conn, age time.Duration) {
		e.h1.put(c, lim)
		c.last = time.Now().Add(-age)
	}
	first := get(true)
	idleFor(first, time.Second)
	if c := get(true); c != first {
		t.Fatal("a live connection was not used again")
	}
	idleFor(first, 2*time.Second)
	_ = (<-accepted).Close()
	if _, err := first.c.Read(make([]byte, 1)); err == nil {
		t.Fatal("the app's end of the connection is open")
	}
	second := get(true)
	if second == first {
		t.Fatal("a closed connection was used again")
	}
	idleFor(second, time.Second)
	third := get(true)
	if third == second {
		t.Error("a connection of an age at which the app may close it got what cannot be repeated")
	}
	idleFor(third, 100*time.Millisecond)
	if c := get(true); c != third {
		t.Error("a young connection was not used again")
	}
	if c := get(false); c != second {
		t.Error("what can be repeated did not get the old connection")
	}
	for _, c := range []*h1conn{second, third} {
		c.close()
	}
}

package drain

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/m3o/m3o"
)

var noon = time.Date(2026, 5, 4, 12, 0, 0, 123456000, time.UTC)

func line(i int) Line {
	return Line{Time: noon.Add(time.Duration(i) * time.Second), App: "hello", Source: "app", Process: "web", Instance: "hello-web-v3-x7k2q9",
		Release: 3, Stream: "stderr", Text: fmt.Sprintf("line %d", i)}
}

// running runs d until the test ends.
func running(t *testing.T, d *Drain) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// collector is an HTTPS server that keeps what it is posted, after answering
// what answers holds.
type collector struct {
	*httptest.Server
	mu      sync.Mutex // guards below
	answers []int
	header  http.Header
	path    string
	got     chan []byte
}

func newCollector(t *testing.T, answers ...int) (*collector, Options) {
	t.Helper()
	c := &collector{answers: answers, got: make(chan []byte, 100)}
	c.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		c.mu.Lock()
		defer c.mu.Unlock()
		if len(c.answers) > 0 {
			w.WriteHeader(c.answers[0])
			c.answers = c.answers[1:]
			return
		}
		c.header, c.path = r.Header, r.URL.String()
		c.got <- b
	}))
	t.Cleanup(c.Close)
	roots := x509.NewCertPool()
	roots.AddCert(c.Certificate())
	return c, Options{Roots: roots, Wait: time.Millisecond, Pause: time.Millisecond}
}

func TestHTTPSDrainPostsJSON(t *testing.T) {
	c, o := newCollector(t, 503, 429) // and is tried again
	d, err := New(strings.Replace(c.URL, "https://", "https://ada:secret@", 1)+"/in?token=&x=1", o)
	if err != nil {
		t.Fatal(err)
	}
	d.Add(line(1))
	d.Add(line(2))
	running(t, d)
	var got []map[string]any
	for len(got) < 2 {
		var some []map[string]any
		if err := json.Unmarshal(<-c.got, &some); err != nil {
			t.Fatal(err)
		}
		got = append(got, some...)
	}
	want := map[string]any{"time": "2026-05-04T12:00:02.123456Z", "app": "hello", "source": "app", "process": "web", "instance": "hello-web-v3-x7k2q9",
		"release": "v3", "stream": "stderr", "text": "line 2"}
	if fmt.Sprint(got[1]) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", got[1], want)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if user, pass, _ := (&http.Request{Header: c.header}).BasicAuth(); user != "ada" || pass != "secret" || !strings.Contains(c.path, "x=1") {
		t.Errorf("user %q at %s", user, c.path)
	}
}

func TestOTLPDrainSpeaksItsJSON(t *testing.T) {
	c, o := newCollector(t)
	d, err := New("otlp+"+c.URL+"?token=abc", o)
	if err != nil {
		t.Fatal(err)
	}
	d.Add(line(1))
	running(t, d)
	var req otlpRequest
	b := <-c.got
	if err := json.Unmarshal(b, &req); err != nil || len(req.ResourceLogs) != 1 {
		t.Fatalf("%v: %s", err, b)
	}
	rec := req.ResourceLogs[0].ScopeLogs[0].LogRecords[0]
	if rec.Body.StringValue != "line 1" || rec.TimeUnixNano != strconv.FormatInt(line(1).Time.UnixNano(), 10) || !strings.Contains(string(b), `{"key":"service.name","value":{"stringValue":"hello"}}`) {
		t.Errorf("got %s", b)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.path != "/v1/logs" || c.header.Get("Authorization") != "Bearer abc" {
		t.Errorf("posted to %s with %s", c.path, c.header.Get("Authorization"))
	}
}

// syslogServer is a TLS listener that reads RFC 6587 frames.
func syslogServer(t *testing.T) (addr string, o Options, got chan string, hangUp func()) {
	t.Helper()
	made := httptest.NewUnstartedServer(nil) // for its certificate
	made.StartTLS()
	t.Cleanup(made.Close)
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: made.TLS.Certificates})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	got = make(chan string, 100)
	var mu sync.Mutex
	var conns []net.Conn
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
			go func() {
				r := bufio.NewReader(c)
				for {
					n, err := r.ReadString(' ')
					if err != nil {
						return
					}
					size, err := strconv.Atoi(strings.TrimSpace(n))
					b := make([]byte, size)
					if err == nil {
						_, err = io.ReadFull(r, b)
					}
					if err != nil {
						return
					}
					got <- string(b)
				}
			}()
		}
	}()
	roots := x509.NewCertPool()
	roots.AddCert(made.Certificate())
	return ln.Addr().String(), Options{Roots: roots, Wait: time.Millisecond, Pause: time.Millisecond}, got, func() {
		mu.Lock()
		defer mu.Unlock()
		for _, c := range conns {
			_ = c.Close()
		}
	}
}

func TestSyslogDrainFramesAndConnectsAgain(t *testing.T) {
	addr, o, got, hangUp := syslogServer(t)
	d, err := New("syslog+tls://"+addr, o)
	if err != nil {
		t.Fatal(err)
	}
	running(t, d)
	d.Add(line(1))
	want := "<12>1 2026-05-04T12:00:01.123456Z hello web app hello-web-v3-x7k2q9 - line 1"
	if g := <-got; g != want {
		t.Errorf("got %q, want %q", g, want)
	}
	hangUp()
	for i := 2; ; i++ { // a line may be lost with the connection, the next arrives
		d.Add(line(i))
		select {
		case g := <-got:
			if !strings.Contains(g, "line ") {
				t.Errorf("got %q", g)
			}
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func TestDrainDropsTheOldestAndCounts(t *testing.T) {
	d, err := New("https://203.0.113.1/", Options{Lines: 10, Bytes: 1000})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 25 {
		d.Add(line(i)) // nobody sends: it must not wait
	}
	if s := d.Stats(); s.Waiting != 10 || s.Dropped != 15 || d.queue[0].Text != "line 15" {
		t.Errorf("%+v, first %q", s, d.queue[0].Text)
	}
	d.Add(Line{Text: strings.Repeat("x", 995)})
	if s := d.Stats(); s.Waiting != 1 || s.Dropped != 25 {
		t.Errorf("by size: %+v", s)
	}
}

func TestRefusedLinesAreDroppedAndTold(t *testing.T) {
	c, o := newCollector(t, 400)
	o.Batch = 1
	d, err := New(c.URL, o)
	if err != nil {
		t.Fatal(err)
	}
	d.Add(line(1))
	d.Add(line(2))
	running(t, d)
	if b := <-c.got; !strings.Contains(string(b), "line 2") {
		t.Errorf("got %s", b)
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for d.Stats().Sent != 1 {
		<-tick.C // the answer is on its way
	}
	if s := d.Stats(); s.Dropped != 1 {
		t.Errorf("%+v", s)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"syslog+tls://logs.example.com:6514", "https://u:p@h/x?token=1", "otlp+https://h", "http://h", "syslog+tls://", "https://[::1]:1/", "://", "https://h/%2"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		u, err := Parse(raw)
		if err != nil {
			if m3o.KindOf(err) != m3o.Invalid || m3o.HintOf(err) == "" {
				t.Errorf("Parse(%q) = %v", raw, err)
			}
			return
		}
		if _, pass := u.User, ""; u.User != nil {
			if pass, _ = u.User.Password(); len(pass) > 8 && strings.Contains(Redact(u), pass) && !strings.Contains(u.Host+u.Path, pass) {
				t.Errorf("Redact(%q) = %q shows the password", raw, Redact(u))
			}
		}
		if _, err := New(raw, Options{}); err != nil {
			t.Errorf("New(%q) = %v", raw, err)
		}
	})
}

func TestParse(t *testing.T) {
	for raw, want := range map[string]string{
		"syslog+tls://logs.example.com": "syslog+tls://logs.example.com:6514",
		"https://u:p@h/x?token=1":       "https://…@h/x?…",
		"otlp+https://h:4318":           "otlp+https://h:4318",
		"http://h":                      "",
		"syslog://h":                    "",
		"ftp://h":                       "",
		"h":                             "",
		"https://":                      "",
		"syslog+tls://h/path":           "",
	} {
		u, err := Parse(raw)
		got := ""
		if err == nil {
			got = Redact(u)
		}
		if got != want {
			t.Errorf("Parse(%q) = %q, %v, want %q", raw, got, err, want)
		}
	}
}

func FuzzFrame(f *testing.F) {
	f.Add("hello", "web", "x", "text")
	f.Add("h\xff", "w\n", strings.Repeat("i", 100), strings.Repeat("ä", 40000))
	f.Fuzz(func(t *testing.T, app, process, instance, text string) {
		b := frame(Line{App: app, Process: process, Instance: instance, Text: text, Time: noon})
		n, rest, ok := strings.Cut(string(b), " ")
		if size, err := strconv.Atoi(n); !ok || err != nil || size != len(rest) || strings.ContainsAny(rest, "\n\r") || size > maxSyslog {
			t.Errorf("frame %q", b)
		}
	})
}

// Package drain sends log lines to where their owner keeps logs: a syslog
// server by TLS (RFC 5424 in the framing of RFC 6587), an HTTPS address that
// takes JSON, or an OpenTelemetry collector (OTLP/HTTP, JSON encoding). A
// drain that is slow or away makes nobody wait: what does not fit its buffer
// is dropped, oldest first, and counted.
//
// It must not know where the lines come from.
package drain

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/m3o/m3o"
)

// A Line is one line of an app's log.
type Line struct {
	Time     time.Time
	App      string
	Source   string // "app", "build", "router" or "m3o"
	Process  string // process type; "" when Source is not an app's
	Instance string
	Release  int    // 0 when unknown
	Stream   string // "stdout" or "stderr"
	Text     string
}

// Options bound a drain. The zero value of a field means its default.
type Options struct {
	Lines   int            // buffered at most; 10,000
	Bytes   int            // of their texts; 8 MB
	Batch   int            // lines of a request or write at most; 500
	Wait    time.Duration  // how long a batch may fill; 1 s
	Timeout time.Duration  // of one attempt; 10 s
	Pause   time.Duration  // before the second attempt, doubling to a minute, half of it at random; 1 s
	Roots   *x509.CertPool // nil: the system's
	Log     *slog.Logger   // nil discards
}

func (o Options) withDefaults() Options {
	o.Lines, o.Bytes, o.Batch = cmp.Or(o.Lines, 10_000), cmp.Or(o.Bytes, 8<<20), cmp.Or(o.Batch, 500)
	o.Wait, o.Timeout, o.Pause = cmp.Or(o.Wait, time.Second), cmp.Or(o.Timeout, 10*time.Second), cmp.Or(o.Pause, time.Second)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// Stats say how a drain does.
type Stats struct {
	Sent    int64     // lines the other side took
	Dropped int64     // lines that were lost: the buffer was full, or they were refused
	Waiting int       // lines in the buffer
	Err     string    // of the last attempt, "" when it went well
	Acked   time.Time // time of the newest line that was taken
}

// A sink sends one batch, all or nothing. Only one call runs at a time.
type sink interface {
	send(ctx context.Context, batch []Line) error
	close()
}

// refused is an error that trying again does not help: the batch is dropped.
type refused struct{ error }

// A Drain takes lines by Add and sends them while Run runs.
type Drain struct {
	o    Options
	sink sink
	wake chan struct{}

	mu    sync.Mutex // guards below
	queue []Line
	bytes int
	stats Stats
}

// Parse checks the address of a drain: syslog+tls://host:port,
// https://host/path or otlp+https://host[/path]. A user and password, or
// ?token=… for OTLP and HTTPS, become the Authorization header.
func Parse(raw string) (*url.URL, error) {
	u, err := url.Parse(raw)
	bad := func(format string, args ...any) (*url.URL, error) {
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf(format, args...),
			Hint: "a drain is syslog+tls://host:port, https://host/path or otlp+https://host/path"}
	}
	if err != nil || len(raw) > 2000 {
		return bad("the drain's address is no URL") // it may hold a password, so it is not repeated
	}
	if u.Hostname() == "" || u.Fragment != "" || u.Opaque != "" {
		return bad("the drain's address names no host")
	}
	switch u.Scheme {
	case "https", "otlp+https":
	case "syslog+tls":
		if u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.User != nil {
			return bad("a syslog drain has nothing but a host and a port")
		}
		if u.Port() == "" {
			u.Host = net.JoinHostPort(u.Hostname(), "6514")
		}
	case "http", "otlp+http", "syslog", "syslog+tcp", "syslog+udp":
		return bad("logs are not sent without TLS")
	default:
		return bad("no drain is called %q", u.Scheme)
	}
	return u, nil
}

// Redact is an address as it may be shown: without password and query.
func Redact(u *url.URL) string {
	v := *u
	v.User = nil
	if u.User != nil {
		v.User = url.User("…")
	}
	if v.RawQuery != "" {
		v.RawQuery = "…"
	}
	s, err := url.PathUnescape(v.String())
	if err != nil {
		return v.String()
	}
	return s
}

// New makes the drain of an address that Parse accepts.
func New(raw string, o Options) (*Drain, error) {
	u, err := Parse(raw)
	if err != nil {
		return nil, err
	}
	d := &Drain{o: o.withDefaults(), wake: make(chan struct{}, 1)}
	conf := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: o.Roots, ServerName: u.Hostname()}
	if u.Scheme == "syslog+tls" {
		d.sink = &syslogSink{addr: u.Host, tls: conf, timeout: d.o.Timeout}
		return d, nil
	}
	h := &httpSink{client: &http.Client{
		Transport:     &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true, MaxIdleConns: 1, IdleConnTimeout: time.Minute, Proxy: http.ProxyFromEnvironment},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Timeout:       d.o.Timeout,
	}}
	if u.User != nil {
		pass, _ := u.User.Password()
		h.user, h.pass = u.User.Username(), pass
		u.User = nil
	}
	q := u.Query()
	if token := q.Get("token"); token != "" {
		h.token = token
		q.Del("token")
		u.RawQuery = q.Encode()
	}
	h.encode = encodeJSON
	if rest, ok := strings.CutPrefix(u.Scheme, "otlp+"); ok {
		u.Scheme, h.encode = rest, encodeOTLP
		if u.Path == "" || u.Path == "/" {
			u.Path = "/v1/logs"
		}
	}
	h.url = u.String()
	d.sink = h
	return d, nil
}

// Add takes a line. It never waits.
func (d *Drain) Add(l Line) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for len(d.queue) > 0 && (len(d.queue) >= d.o.Lines || d.bytes+len(l.Text) > d.o.Bytes) {
		d.bytes -= len(d.queue[0].Text)
		d.queue[0] = Line{}
		d.queue = d.queue[1:]
		d.stats.Dropped++
	}
	d.queue = append(d.queue, l)
	d.bytes += len(l.Text)
	if len(d.queue) == 1 || len(d.queue) == d.o.Batch {
		select {
		case d.wake <- struct{}{}:
		default:
		}
	}
}

// Missed counts lines that got lost on the way to Add.
func (d *Drain) Missed(n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stats.Dropped += n
}

// Stats is how it does now.
func (d *Drain) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.stats
	s.Waiting = len(d.queue)
	return s
}

// take removes a batch from the buffer.
func (d *Drain) take() []Line {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := min(len(d.queue), d.o.Batch)
	batch := append([]Line(nil), d.queue[:n]...)
	clear(d.queue[:n])
	if d.queue = d.queue[n:]; len(d.queue) == 0 {
		d.queue = nil // let go of the array
	}
	for _, l := range batch {
		d.bytes -= len(l.Text)
	}
	return batch
}

func (d *Drain) waiting() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.queue)
}

// lastTry bounds what is still sent when Run ends.
const lastTry = 2 * time.Second

// Run sends until ctx ends, then tries once more with what is left.
func (d *Drain) Run(ctx context.Context) error {
	defer d.sink.close()
	for {
		for d.waiting() == 0 {
			select {
			case <-ctx.Done():
				return nil
			case <-d.wake:
			}
		}
		if d.waiting() < d.o.Batch { // let it fill
			t := time.NewTimer(d.o.Wait)
			select {
			case <-ctx.Done():
			case <-t.C:
			case <-d.wake:
			}
			t.Stop()
		}
		d.deliver(ctx, d.take())
		if ctx.Err() != nil {
			return nil
		}
	}
}

// deliver sends one batch, again and again until it is taken, refused or ctx
// ends. New lines push old ones out of the buffer meanwhile.
func (d *Drain) deliver(ctx context.Context, batch []Line) {
	for pause := d.o.Pause; ; pause = min(2*pause, time.Minute) {
		actx, cancel := context.WithTimeout(ctx, d.o.Timeout)
		if ctx.Err() != nil {
			cancel()
			actx, cancel = context.WithTimeout(context.WithoutCancel(ctx), lastTry)
		}
		err := d.sink.send(actx, batch)
		cancel()
		_, no := err.(refused) //nolint:errorlint // made here, never wrapped
		d.mu.Lock()
		d.stats.Err = ""
		switch {
		case err == nil:
			d.stats.Sent += int64(len(batch))
			d.stats.Acked = batch[len(batch)-1].Time
		case no || ctx.Err() != nil:
			d.stats.Dropped += int64(len(batch))
			fallthrough
		default:
			d.stats.Err = err.Error()
		}
		d.mu.Unlock()
		if err == nil || no || ctx.Err() != nil {
			return
		}
		d.o.Log.Debug("drain does not take lines", "err", err)
		t := time.NewTimer(pause/2 + rand.N(pause/2+1))
		select {
		case <-ctx.Done():
		case <-t.C:
		}
		t.Stop()
	}
}

// httpSink posts batches.
type httpSink struct {
	client            *http.Client
	url               string
	user, pass, token string
	encode            func([]Line) ([]byte, error)
}

func (h *httpSink) send(ctx context.Context, batch []Line) error {
	body, err := h.encode(batch)
	if err != nil {
		return refused{err}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.url, strings.NewReader(string(body)))
	if err != nil {
		return refused{err}
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "m3o")
	switch {
	case h.token != "":
		req.Header.Set("Authorization", "Bearer "+h.token)
	case h.user != "":
		req.SetBasicAuth(h.user, h.pass)
	}
	res, err := h.client.Do(req)
	if err != nil {
		if ue, ok := err.(*url.Error); ok { //nolint:errorlint // Do's own type; its text holds the URL, which may hold a secret
			err = ue.Err
		}
		return err
	}
	defer res.Body.Close() //nolint:errcheck // read or given up
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, 64<<10))
	switch c := res.StatusCode; {
	case c < 300:
		return nil
	case c == http.StatusTooManyRequests, c == http.StatusRequestTimeout, c >= 500, c >= 300 && c < 400, c == http.StatusUnauthorized, c == http.StatusForbidden, c == http.StatusNotFound:
		return fmt.Errorf("it answered %s", res.Status) // somebody may mend it
	default:
		return refused{fmt.Errorf("it answered %s", res.Status)}
	}
}

func (h *httpSink) close() { h.client.CloseIdleConnections() }

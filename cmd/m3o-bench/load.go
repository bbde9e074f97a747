//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	testpb "google.golang.org/grpc/interop/grpc_testing"
)

// burst is how long a load lasts.
const burst = time.Second

// loaded is what one run of a load generator saw, and the proxy's CPU for each
// request.
type loaded struct {
	requests int
	rate     float64
	p50, p99 time.Duration
	cpu      time.Duration
}

// A load is one kind of requests, sent to a proxy for a time.
type load func(context.Context, *proxied, time.Duration) (loaded, error)

// turns loads all by turns, each round another one first, and gives the run
// with the median CPU of each.
func (b *bench) turns(ctx context.Context, ps []*proxied, l load) ([]loaded, error) {
	runs := make([][]loaded, len(ps))
	for round := range min(b.rounds, 3) {
		for k := range ps {
			i := (k + round) % len(ps)
			one, err := measured(ctx, ps[i], l)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", ps[i].name, err)
			}
			runs[i] = append(runs[i], one)
		}
	}
	out := make([]loaded, len(ps))
	for i, ls := range runs {
		slices.SortFunc(ls, func(a, b loaded) int { return cmp.Compare(a.cpu, b.cpu) })
		out[i] = ls[len(ls)/2]
	}
	return out, nil
}

func measured(ctx context.Context, p *proxied, l load) (loaded, error) {
	before, err := p.cpu()
	if err != nil {
		return loaded{}, err
	}
	one, err := patient(ctx, p, l)
	if err != nil {
		return one, err
	}
	after, err := p.cpu()
	one.cpu = (after - before) / time.Duration(max(1, one.requests))
	return one, err
}

// errNothing is a burst in which not one request was answered.
var errNothing = errors.New("no request was answered")

// patient loads p for a burst, and longer when a machine that is busy with
// other things left nothing of it.
func patient(ctx context.Context, p *proxied, l load) (loaded, error) {
	for d := burst; ; d *= 3 {
		one, err := l(ctx, p, d)
		if d > 5*burst || !errors.Is(err, errNothing) {
			return one, err
		}
	}
}

var (
	wrkCount = regexp.MustCompile(`(\d+) requests in`)
	wrkRate  = regexp.MustCompile(`Requests/sec:\s+([\d.]+)`)
	wrkP50   = regexp.MustCompile(`(?m)^\s+50%\s+(\S+)`)
	wrkP99   = regexp.MustCompile(`(?m)^\s+99%\s+(\S+)`)
	wrkBad   = regexp.MustCompile(`(?m)Non-2xx or 3xx responses: (\d+)|Socket errors: (.*)`)
	h2Count  = regexp.MustCompile(`requests: \d+ total, \d+ started, (\d+) done, (\d+) succeeded`)
)

func find(re *regexp.Regexp, s string) string {
	if m := re.FindStringSubmatch(s); m != nil {
		return m[1]
	}
	return ""
}

// wrk sends HTTP/1.1, over so many connections.
func wrk(ctx context.Context, url string, d time.Duration, conns int, more ...string) (loaded, error) {
	args := append([]string{"-t1", "-c", strconv.Itoa(conns), "-d" + d.String(), "--latency", "--timeout", "20s"}, more...)
	out, err := exec.CommandContext(ctx, "wrk", append(args, url)...).CombinedOutput()
	s := string(out)
	if err != nil {
		return loaded{}, fmt.Errorf("wrk: %w: %s", err, s)
	}
	if bad := wrkBad.FindString(s); bad != "" {
		return loaded{}, fmt.Errorf("wrk: %s", bad)
	}
	var l loaded
	l.requests, _ = strconv.Atoi(find(wrkCount, s))
	l.rate, _ = strconv.ParseFloat(find(wrkRate, s), 64)
	l.p50, _ = time.ParseDuration(find(wrkP50, s))
	l.p99, _ = time.ParseDuration(find(wrkP99, s))
	if l.requests == 0 {
		return l, fmt.Errorf("%w: %s", errNothing, s)
	}
	return l, nil
}

// h2load sends HTTP/2, over so many connections with so many streams each.
func h2load(ctx context.Context, url string, d time.Duration, conns, streams int, more ...string) (loaded, error) {
	dir, err := os.MkdirTemp("", "m3o-bench-h2load-")
	if err != nil {
		return loaded{}, err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // in the temporary directory
	log := filepath.Join(dir, "log")
	args := append([]string{"-D", strconv.Itoa(int(d.Seconds())), "-c", strconv.Itoa(conns), "-m", strconv.Itoa(streams), "-w20", "-W24", "--log-file=" + log}, more...)
	// On a busy machine its connections may not all be there when the time is
	// over, and then it never ends.
	bounded, cancel := context.WithTimeout(ctx, d+5*time.Second)
	defer cancel()
	out, err := exec.CommandContext(bounded, "h2load", append(args, url)...).CombinedOutput()
	s := string(out)
	if err != nil && bounded.Err() != nil && ctx.Err() == nil {
		return loaded{}, fmt.Errorf("%w: h2load did not end", errNothing)
	}
	if err != nil {
		return loaded{}, fmt.Errorf("h2load: %w: %s", err, s)
	}
	m := h2Count.FindStringSubmatch(s)
	if m != nil && m[1] == "0" {
		return loaded{}, fmt.Errorf("%w: %s", errNothing, s)
	}
	if m == nil || m[1] != m[2] {
		return loaded{}, fmt.Errorf("h2load: not all requests succeeded: %s", s)
	}
	var l loaded
	l.requests, _ = strconv.Atoi(m[1])
	l.rate = float64(l.requests) / d.Seconds()
	lines, err := os.ReadFile(log)
	if err != nil {
		return l, err
	}
	var took durations
	for line := range strings.Lines(string(lines)) { // begin, status, microseconds
		if f := strings.Fields(line); len(f) == 3 {
			us, _ := strconv.Atoi(f[2])
			took.add(time.Duration(us) * time.Microsecond)
		}
	}
	l.p50, l.p99 = percentiles(took)
	return l, nil
}

func percentiles(took durations) (p50, p99 time.Duration) {
	if len(took) == 0 {
		return 0, 0
	}
	slices.Sort(took)
	return took[len(took)/2], took[len(took)*99/100]
}

// workers runs f in n goroutines for the time d; f does one request or message
// after the other until stop says so, and tells of each.
func workers(n int, d time.Duration, f func(i int, stop func() bool, tell func(began time.Time)) error) (loaded, error) {
	all := make([]durations, n)
	errs := make([]error, n)
	var wg sync.WaitGroup
	began := time.Now()
	for i := range n {
		wg.Go(func() {
			errs[i] = f(i, func() bool { return time.Since(began) > d }, func(t time.Time) { all[i].add(time.Since(t)) })
		})
	}
	wg.Wait()
	took := slices.Concat(all...)
	l := loaded{requests: len(took), rate: float64(len(took)) / time.Since(began).Seconds()}
	l.p50, l.p99 = percentiles(took)
	return l, errors.Join(errs...)
}

// dialRPC opens connections for a load; the proxy is asked for the app rpc.
func dialRPC(p *proxied, n int) ([]testpb.TestServiceClient, func(), error) {
	var clients []testpb.TestServiceClient
	var conns []*grpc.ClientConn
	end := func() {
		for _, c := range conns {
			_ = c.Close()
		}
	}
	for range n {
		c, err := grpc.NewClient("passthrough:///"+p.rpc, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("rpc.localhost"))
		if err != nil {
			end()
			return nil, nil, err
		}
		conns = append(conns, c)
		clients = append(clients, testpb.NewTestServiceClient(c))
	}
	return clients, end, nil
}

// pingPong exchanges messages of 100 bytes on 64 streams over 8 connections; a
// request is one message there and one back.
func pingPong(ctx context.Context, p *proxied, d time.Duration) (loaded, error) {
	clients, end, err := dialRPC(p, 8)
	if err != nil {
		return loaded{}, err
	}
	defer end()
	return workers(64, d, func(i int, stop func() bool, tell func(time.Time)) error {
		s, err := clients[i%len(clients)].FullDuplexCall(ctx)
		if err != nil {
			return err
		}
		m := &testpb.StreamingOutputCallRequest{Payload: &testpb.Payload{Body: make([]byte, 100)}}
		for !stop() {
			t := time.Now()
			if err := s.Send(m); err != nil {
				return err
			}
			if _, err := s.Recv(); err != nil {
				return err
			}
			tell(t)
		}
		if err := s.CloseSend(); err != nil {
			return err
		}
		if _, err = s.Recv(); errors.Is(err, io.EOF) {
			return nil
		}
		return fmt.Errorf("the stream did not end well: %w", err)
	})
}

// downStream reads streams of 500 messages of 1 KB, 16 at once over 4
// connections; a request is one message.
func downStream(ctx context.Context, p *proxied, d time.Duration) (loaded, error) {
	clients, end, err := dialRPC(p, 4)
	if err != nil {
		return loaded{}, err
	}
	defer end()
	in := &testpb.StreamingOutputCallRequest{}
	for range 500 {
		in.ResponseParameters = append(in.ResponseParameters, &testpb.ResponseParameters{Size: 1024})
	}
	return workers(16, d, func(i int, stop func() bool, tell func(time.Time)) error {
		for !stop() {
			s, err := clients[i%len(clients)].StreamingOutputCall(ctx, in)
			if err != nil {
				return err
			}
			for {
				t := time.Now()
				if _, err := s.Recv(); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					return err
				}
				tell(t)
			}
		}
		return nil
	})
}

// closer is an app that closes its connections after a random time of being
// idle, which is what makes a proxy's next request on one a gamble.
func closer(ctx context.Context) error {
	ln, err := net.Listen("tcp", os.Getenv("M3O_BENCH_HTTP"))
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
	for {
		c, err := ln.Accept()
		if err != nil {
			return nil // closed
		}
		go closing(c)
	}
}

// closing answers requests of up to a buffer's size, which those of the
// benchmark are, for as long as they come soon enough.
func closing(c net.Conn) {
	defer c.Close() //nolint:errcheck // that is what it is for
	buf := make([]byte, 16<<10)
	patience := 10 * time.Second // for the first request
	for {
		_ = c.SetReadDeadline(time.Now().Add(patience))
		n, err := c.Read(buf)
		if err != nil || n == 0 {
			return
		}
		if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"); err != nil {
			return
		}
		patience = time.Duration(1+rand.IntN(9_000)) * time.Microsecond
	}
}

// raceToClose posts to the app that closes idle connections, pausing as long as
// it waits, and counts how many were answered 502 and how many were sent.
func raceToClose(ctx context.Context, addr, host string) (bad, sent int, err error) {
	const clients, each = 32, 400
	bads := make([]int, clients)
	errs := make([]error, clients)
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			tr := &http.Transport{}
			defer tr.CloseIdleConnections()
			for range each {
				time.Sleep(time.Duration(rand.IntN(9_000)) * time.Microsecond)
				req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+addr+"/", strings.NewReader("x=1"))
				if err != nil {
					errs[i] = err
					return
				}
				req.Host = host
				res, err := tr.RoundTrip(req)
				if err != nil {
					errs[i] = err
					return
				}
				_, _ = io.Copy(io.Discard, res.Body) // the next request shows whether it is well
				_ = res.Body.Close()
				switch res.StatusCode {
				case http.StatusOK:
				case http.StatusBadGateway:
					bads[i]++
				default:
					errs[i] = fmt.Errorf("status %d", res.StatusCode)
					return
				}
			}
		})
	}
	wg.Wait()
	for _, n := range bads {
		bad += n
	}
	return bad, clients * each, errors.Join(errs...)
}

func micros(d time.Duration) string { return fmt.Sprintf("%.1f µs", float64(d)/1e3) }

func awaitPort(ctx context.Context, addr string) error {
	for {
		c, err := net.DialTimeout("tcp", addr, time.Second)
		if err == nil {
			return c.Close()
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

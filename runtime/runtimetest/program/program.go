// Package program is the app that the drivers' tests run: one program that can
// serve, crash, hang, print and look around, as its arguments say. It is built
// into a static binary by runtimetest, and called as a function by tests of
// drivers that run functions. It knows nothing of the project.
package program

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// A Process is what the program runs in.
type Process struct {
	Args     []string // without the program's name
	Env      func(string) string
	In       io.Reader
	Out, Err io.Writer
	Listen   func(network, addr string) (net.Listener, error)
	Killed   <-chan struct{} // closed where there is no SIGKILL; nil in a real process
}

// Main runs until done or, if it serves, until ctx ends, and returns the exit
// code. The first argument says what to do:
//
//	serve            an HTTP/1.1 server on $PORT: / tells of itself, /exit?code=N ends it,
//	                 /health answers 200, or 503 after /sick, /print?n=N prints lines
//	grpc             HTTP/2 without TLS; grpc.health.v1 says SERVING
//	sick             serve, but / and /health answer 503
//	port N           listens on N instead
//	loopback         listens on 127.0.0.1:$PORT only
//	mute             listens nowhere, and stays
//	exit N           prints a line and exits with code N
//	oom              takes memory until there is none
//	stubborn         serve, but ignores the request to end
//	print N          prints N lines on stdout, then stays
//	cat              copies stdin to stdout
//	env NAME…        prints variables
//	look             prints what it can see of its surroundings, as JSON (see Look)
//	dial ADDR…       prints whether each can be connected to
//	lookup NAME…     prints the addresses of each name, or why there are none
//	fork             makes processes until it may not, prints how many
//	fds              opens files until it may not, prints how many
//	fill             writes to /tmp until it may not, prints why
//	flood N          prints N numbered lines as fast as it can
//	hog KIND         serve, and takes cpu, memory, fds, tmp, fork or log for ever
//	size             waits for a line on stdin, prints the size of its terminal
func Main(ctx context.Context, p Process) int {
	if len(p.Args) == 0 {
		p.Args = []string{"serve"}
	}
	arg := func(i int) string {
		if i < len(p.Args) {
			return p.Args[i]
		}
		return ""
	}
	addr := ":" + p.Env("PORT")
	switch p.Args[0] {
	case "serve", "grpc", "sick", "stubborn":
		return serve(ctx, p, addr, p.Args[0])
	case "port":
		return serve(ctx, p, ":"+arg(1), "serve")
	case "loopback":
		return serve(ctx, p, "127.0.0.1"+addr, "serve")
	case "mute":
		say(p.Out, "not listening")
		<-ctx.Done()
		return 0
	case "exit":
		n, _ := strconv.Atoi(arg(1))
		say(p.Err, "about to exit with "+arg(1))
		return n
	case "oom":
		say(p.Out, "taking memory")
		var hog [][]byte
		for ctx.Err() == nil {
			b := make([]byte, 4<<20)
			for i := 0; i < len(b); i += 4096 {
				b[i] = 1
			}
			hog = append(hog, b)
		}
		return len(hog) & 1
	case "print":
		n, _ := strconv.Atoi(arg(1))
		printLines(p.Out, n)
		<-ctx.Done()
		return 0
	case "cat":
		if _, err := io.Copy(p.Out, p.In); err != nil {
			say(p.Err, err.Error())
			return 1
		}
		return 0
	case "env":
		for _, k := range p.Args[1:] {
			say(p.Out, k+"="+p.Env(k))
		}
		return 0
	case "look":
		_ = json.NewEncoder(p.Out).Encode(Look())
		return 0
	case "lookup":
		for _, n := range p.Args[1:] {
			ips, err := (&net.Resolver{PreferGo: true}).LookupHost(ctx, n)
			if err != nil {
				if d, ok := errors.AsType[*net.DNSError](err); ok {
					ips = []string{d.Err}
				}
			}
			slices.Sort(ips)
			say(p.Out, n+" "+strings.Join(ips, ","))
		}
		return 0
	case "fork":
		n := 0
		for n < 1000 {
			proc, err := os.StartProcess("/proc/self/exe", []string{"server", "mute"}, &os.ProcAttr{})
			if err != nil {
				say(p.Out, fmt.Sprint(n < 1000, " ", strings.Contains(err.Error(), "temporarily unavailable")))
				return 0
			}
			defer proc.Kill() //nolint:errcheck // they go with the container
			n++
		}
		say(p.Out, "no limit")
		return 0
	case "fds":
		n := 0
		for ; n < 1_000_000; n++ {
			f, err := os.Open("/dev/null")
			if err != nil {
				break
			}
			defer f.Close() //nolint:errcheck // it ends anyhow
		}
		say(p.Out, strconv.Itoa(n))
		return 0
	case "fill":
		say(p.Out, fill("/tmp/filler"))
		return 0
	case "flood":
		n, _ := strconv.Atoi(arg(1))
		printLines(p.Out, n)
		return 0
	case "hog":
		go hog(p, arg(1))
		return serve(ctx, p, addr, "serve")
	case "size":
		_, _ = bufio.NewReader(p.In).ReadString('\n')
		say(p.Out, size())
		return 0
	case "dial":
		for _, a := range p.Args[1:] {
			say(p.Out, a+" "+dial(a))
		}
		return 0
	}
	say(p.Err, "do not know "+p.Args[0])
	return 2
}

// fill writes zeros until that fails, and says why.
func fill(path string) string {
	f, err := os.Create(path)
	if err != nil {
		return err.Error()
	}
	defer os.Remove(path) //nolint:errcheck // a hog
	defer f.Close()       //nolint:errcheck // a hog
	block := make([]byte, 1<<20)
	for {
		if _, err := f.Write(block); err != nil {
			return err.Error()
		}
	}
}

// hog takes as much of one thing as it gets, again and again.
func hog(p Process, kind string) {
	for {
		switch kind {
		case "cpu":
			for n := 0; n < 8; n++ {
				go func() {
					for i := 0; ; i++ { //nolint:revive // that is the point
						_ = i
					}
				}()
			}
			select {}
		case "memory": // until it is killed
			var hog [][]byte
			for {
				b := make([]byte, 4<<20)
				for i := 0; i < len(b); i += 4096 {
					b[i] = 1
				}
				hog = append(hog, b)
				goruntime.KeepAlive(hog)
			}
		case "fds":
			var fs []*os.File
			for {
				f, err := os.Open("/dev/null")
				if err != nil {
					break
				}
				fs = append(fs, f)
			}
			for _, f := range fs {
				_ = f.Close()
			}
		case "tmp":
			_ = fill("/tmp/filler")
		case "fork":
			var ps []*os.Process
			for {
				proc, err := os.StartProcess("/proc/self/exe", []string{"server", "mute"}, &os.ProcAttr{})
				if err != nil {
					break
				}
				ps = append(ps, proc)
			}
			for _, proc := range ps {
				_ = proc.Kill()
				_, _ = proc.Wait()
			}
		case "log":
			printLines(p.Out, 10_000)
		default:
			return
		}
	}
}

func say(w io.Writer, s string) { _, _ = fmt.Fprintln(w, s) }

func printLines(w io.Writer, n int) {
	bw := bufio.NewWriter(w)
	for i := range n {
		_, _ = fmt.Fprintf(bw, "line %d\n", i)
	}
	_ = bw.Flush()
}

func dial(addr string) string {
	network := "tcp"
	if a, ok := strings.CutPrefix(addr, "udp:"); ok {
		network, addr = "udp", a
	}
	c, err := net.DialTimeout(network, addr, 700*time.Millisecond)
	if err != nil {
		if t, ok := errors.AsType[net.Error](err); ok && t.Timeout() {
			return "timeout"
		}
		return "refused"
	}
	_ = c.Close()
	return "open"
}

// About is what / answers.
type About struct {
	Instance, Arg string
	Env           map[string]string
}

func serve(ctx context.Context, p Process, addr, kind string) int {
	ln, err := p.Listen("tcp", addr)
	if err != nil {
		say(p.Err, err.Error())
		return 3
	}
	code := make(chan int, 1)
	var sick atomic.Bool
	sick.Store(kind == "sick")
	health := func(w http.ResponseWriter, _ *http.Request) {
		if sick.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/{$}", func(w http.ResponseWriter, r *http.Request) {
		health(w, r)
		_ = json.NewEncoder(w).Encode(About{p.Env("M3O_INSTANCE"), kind, map[string]string{"PORT": p.Env("PORT")}})
	})
	mux.HandleFunc("/health", health)
	mux.HandleFunc("/sick", func(_ http.ResponseWriter, r *http.Request) { sick.Store(r.FormValue("well") == "") })
	mux.HandleFunc("/exit", func(_ http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.FormValue("code"))
		select {
		case code <- n:
		default:
		}
	})
	mux.HandleFunc("/print", func(_ http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.FormValue("n"))
		printLines(p.Out, n)
	})
	mux.HandleFunc("/grpc.health.v1.Health/Check", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Trailer", "Grpc-Status")
		_, _ = w.Write([]byte{0, 0, 0, 0, 2, 0x08, 0x01})
		w.Header().Set("Grpc-Status", "0")
	})
	s := &http.Server{Handler: mux, Protocols: new(http.Protocols), ReadHeaderTimeout: time.Minute}
	s.Protocols.SetUnencryptedHTTP2(kind == "grpc")
	s.Protocols.SetHTTP1(kind != "grpc")
	say(p.Out, "listening on "+addr)
	done := make(chan error, 1)
	go func() { done <- s.Serve(ln) }()
	exit := 0
	stop := ctx.Done()
	if kind == "stubborn" {
		stop = nil
	}
	select {
	case <-stop:
		say(p.Out, "asked to end")
	case exit = <-code:
		sctx, cancel := context.WithTimeout(context.Background(), time.Second)
		_ = s.Shutdown(sctx) // who asked gets an answer
		cancel()
	case <-p.Killed:
	}
	_ = s.Close()
	<-done
	return exit
}

// A View is what a process sees of its surroundings.
type View struct {
	UID, GID     int
	Caps         string // effective, inherited and bounding sets, as in /proc/self/status
	Seccomp      string // 2 is a filter
	NoNewPrivs   string
	UIDMap       string // of its user namespace, "inside outside number" by commas
	RootWrite    string // error of writing a file in /
	TmpWrite     string // error of writing one in /tmp
	Processes    []string
	Hostname     string
	Mounts       int
	CgroupWrite  string
	CgroupRoot   string // content of /proc/self/cgroup
	Kcore        string // error of reading /proc/kcore's first byte
	ResolvConf   string
	GoMemLimit   string
	GoMaxProcs   string
	OpenFiles    string
	SysWritable  string
	ProcWritable string
}

// Look looks around.
func Look() View {
	word := func(err error) string {
		if err == nil {
			return "allowed"
		}
		if pe, ok := errors.AsType[*os.PathError](err); ok {
			return pe.Err.Error()
		}
		return err.Error()
	}
	status := map[string]string{}
	b, _ := os.ReadFile("/proc/self/status")
	for l := range strings.Lines(string(b)) {
		k, v, _ := strings.Cut(l, ":")
		status[k] = strings.TrimSpace(v)
	}
	host, _ := os.Hostname()
	cg, _ := os.ReadFile("/proc/self/cgroup")
	resolv, _ := os.ReadFile("/etc/resolv.conf")
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	limits, _ := os.ReadFile("/proc/self/limits")
	v := View{
		UID: os.Getuid(), GID: os.Getgid(), Hostname: host,
		Caps:    status["CapEff"] + " " + status["CapInh"] + " " + status["CapBnd"],
		Seccomp: status["Seccomp"], NoNewPrivs: status["NoNewPrivs"], UIDMap: uidMap(),
		RootWrite: word(os.WriteFile("/probe", nil, 0o600)), TmpWrite: word(os.WriteFile("/tmp/probe", nil, 0o600)),
		CgroupWrite: word(os.Mkdir("/sys/fs/cgroup/probe", 0o700)), CgroupRoot: string(cg),
		ResolvConf: string(resolv), Mounts: strings.Count(string(mounts), "\n"),
		GoMemLimit: os.Getenv("GOMEMLIMIT"), GoMaxProcs: os.Getenv("GOMAXPROCS"),
		SysWritable:  word(os.WriteFile("/sys/kernel/mm/ksm/run", []byte("0"), 0)),
		ProcWritable: word(os.WriteFile("/proc/sys/kernel/hostname", []byte("x"), 0)),
	}
	for l := range strings.Lines(string(limits)) {
		if strings.HasPrefix(l, "Max open files") {
			v.OpenFiles = strings.Fields(l)[3]
		}
	}
	if f, err := os.Open("/proc/kcore"); err != nil {
		v.Kcore = word(err)
	} else {
		n, _ := f.Read(make([]byte, 1))
		v.Kcore = strconv.Itoa(n) + " bytes"
		_ = f.Close()
	}
	es, _ := os.ReadDir("/proc")
	for _, e := range es {
		if _, err := strconv.Atoi(e.Name()); err == nil {
			v.Processes = append(v.Processes, e.Name())
		}
	}
	slices.Sort(v.Processes)
	return v
}

// uidMap reads /proc/self/uid_map.
func uidMap() string {
	b, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return err.Error()
	}
	var lines []string
	for l := range strings.Lines(string(b)) {
		lines = append(lines, strings.Join(strings.Fields(l), " "))
	}
	return strings.Join(lines, ", ")
}

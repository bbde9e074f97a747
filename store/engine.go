package store

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/nats-io/nats-server/v2/server"
	"golang.org/x/sys/unix"

	"github.com/m3o/m3o"
)

// An engine is the NATS server inside this process. Its connections are pipes:
// it listens on no port, so nobody else on the machine can reach the state.
type engine struct {
	dir  string
	log  *slog.Logger
	lock *os.File // flock held for as long as the engine lives

	mu   sync.Mutex // guards srv and says
	srv  *server.Server
	says *natsLog
}

func startEngine(dir string, log *slog.Logger) (*engine, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory: %w", err)
	}
	// The directory may be older than us; it holds password-equivalents.
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("protect directory: %w", err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	e := &engine{dir: dir, log: log, lock: lock}
	if err = e.start(); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return e, nil
}

// lockDir holds the directory against a second daemon: two servers writing the
// same files would destroy them. The lock dies with the process, however it
// dies; children do not inherit it.
func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		pid, _ := io.ReadAll(io.LimitReader(f, 32))
		_ = f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		who := "another process"
		if p := strings.TrimSpace(string(pid)); p != "" {
			who = "process " + p
		}
		return nil, &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("%s is in use by %s", dir, who),
			Hint: "stop the other m3od, or give this one its own --data directory", Err: err}
	}
	// The number is only for the message above, and the lock holds without it:
	// a full disk must not keep the daemon from starting.
	_ = f.Truncate(0)
	_, _ = f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	return f, nil
}

// start is called with mu held, or before anybody else knows e.
func (e *engine) start() error {
	opts := &server.Options{
		ServerName:     "m3od",
		DontListen:     true,
		NoSigs:         true,
		JetStream:      true,
		StoreDir:       e.dir,
		SyncAlways:     true,
		MaxPayload:     2 * MaxValue, // a value and its headers
		MaxControlLine: 8 << 10,      // a long key
		// The server would else take a share of what is free now as the limit
		// for ever; the reserve is our own limit, and looks at the disk.
		JetStreamMaxStore:  math.MaxInt64 / 4,
		JetStreamMaxMemory: 256 << 20,
	}
	srv, err := server.NewServer(opts)
	if err != nil {
		return fmt.Errorf("configure engine: %w", err)
	}
	l := &natsLog{log: e.log}
	srv.SetLoggerV2(l, false, false, false)
	srv.Start()
	// Start returns when the streams are recovered, or when it has given up.
	if !srv.JetStreamEnabled() || !srv.ReadyForConnections(openTimeout) {
		srv.Shutdown()
		srv.WaitForShutdown()
		return diskError(e.dir, fmt.Errorf("start engine: %s", l.last()))
	}
	e.srv, e.says = srv, l
	return nil
}

// InProcessConn is how the client reaches the server, also when it reconnects
// after a restart.
func (e *engine) InProcessConn() (net.Conn, error) {
	e.mu.Lock()
	srv := e.srv
	e.mu.Unlock()
	return srv.InProcessConn()
}

// healthy reports whether all streams can be written.
func (e *engine) healthy() bool {
	e.mu.Lock()
	srv := e.srv
	e.mu.Unlock()
	return srv.JetStreamEnabled() && srv.Healthz(nil).Status == "ok"
}

func (e *engine) restart() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.srv.Shutdown()
	e.srv.WaitForShutdown()
	return e.start()
}

// full reports whether the engine met a full disk since it was started. Its
// log is the only place where it says so: the write itself goes unanswered.
func (e *engine) full() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.says.full.Load()
}

func (e *engine) close() error {
	if e == nil {
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.srv.Shutdown()
	e.srv.WaitForShutdown()
	return e.lock.Close()
}

func freeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("ask free space of %s: %w", dir, err)
	}
	return int64(st.Bavail) * int64(st.Bsize), nil
}

// natsLog brings the server's log into ours. What the server calls fatal ends
// only the server; it is kept to say why it did not start.
type natsLog struct {
	log  *slog.Logger
	full atomic.Bool
	mu   sync.Mutex // guards why
	why  string
}

func (l *natsLog) last() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.why == "" {
		return "it did not get ready in time"
	}
	return l.why
}

func (l *natsLog) keep(format string, v []any) string {
	text := fmt.Sprintf(format, v...)
	l.mu.Lock()
	l.why = text
	l.mu.Unlock()
	if strings.Contains(text, "no space left") {
		l.full.Store(true)
	}
	return text
}

func (l *natsLog) Noticef(format string, v ...any) { l.say(l.log.Debug, format, v) }
func (l *natsLog) Warnf(format string, v ...any)   { l.say(l.log.Warn, format, v) }
func (l *natsLog) Debugf(format string, v ...any)  { l.say(l.log.Debug, format, v) }
func (l *natsLog) Tracef(format string, v ...any)  { l.say(l.log.Debug, format, v) }
func (l *natsLog) Errorf(format string, v ...any) {
	l.log.Error("store engine", "err", l.keep(format, v))
}
func (l *natsLog) Fatalf(format string, v ...any) {
	l.log.Error("store engine", "err", l.keep(format, v))
}

func (l *natsLog) say(to func(string, ...any), format string, v []any) {
	to("store engine", "says", fmt.Sprintf(format, v...))
}

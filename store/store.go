// Package store keeps everything the platform must not forget: records in
// typed buckets with revisions, lines in append-only logs, and a way to watch
// both. Behind it stands NATS JetStream, by default a server inside this
// process that listens on no port and syncs every write to disk before it
// acknowledges it; with Config.URL an external one.
//
// A write that returned nil survives kill -9 and a power cut. Errors that a
// caller can act on are *m3o.Error: NotFound, Conflict (it changed since it was
// read), Invalid (too big, bad key) and Unavailable (disk full, server away,
// another daemon has the directory).
//
// It does not know what an app or a user is, and no NATS type leaves it.
package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/m3o/m3o"
)

// MaxValue is the most bytes one record (as JSON) or one log line may have.
const MaxValue = 1 << 20

const (
	// opTimeout bounds each request to the engine whose context has no deadline.
	opTimeout = 10 * time.Second
	// openTimeout bounds the start of the embedded engine: recovery reads the
	// index of every stream, which is quick unless the disk is dying.
	openTimeout = 60 * time.Second
	// prefix keeps our streams apart from others' on a shared external server.
	prefix = "m3o-"
)

// Config says where the state is. Dir is for the embedded server; URL, when
// set, takes its place.
type Config struct {
	Dir      string // directory of the embedded server, made with mode 0700; also the lock against a second daemon
	URL      string // external NATS server or comma-separated servers, version 2.11 or newer, with JetStream
	Creds    string // path of the credentials file for URL; "" for none
	Replicas int    // copies of each stream on an external cluster, 1 when 0
	Reserve  int64  // bytes of disk that writes leave free; 64 MB when 0. Only for Dir
	Log      *slog.Logger
}

// Validate reports every fault of the configuration at once.
func (c Config) Validate() error {
	var errs []error
	if c.Dir == "" && c.URL == "" {
		errs = append(errs, errors.New("store needs a directory or the URL of a NATS server"))
	}
	if c.Creds != "" && c.URL == "" {
		errs = append(errs, errors.New("store credentials are only for an external NATS server"))
	}
	if c.Replicas < 0 || c.Replicas > 5 {
		errs = append(errs, fmt.Errorf("store replicas are 1 to 5, not %d", c.Replicas))
	}
	if c.Reserve < 0 {
		errs = append(errs, errors.New("store reserve is negative"))
	}
	if err := errors.Join(errs...); err != nil {
		return &m3o.Error{Kind: m3o.Invalid, Msg: err.Error(), Err: err}
	}
	return nil
}

// A Store is one open place of state. It is safe for concurrent use.
type Store struct {
	cfg    Config
	log    *slog.Logger
	engine *engine // nil with an external server
	nc     *nats.Conn
	js     jetstream.JetStream
	sick   chan struct{} // a write went unanswered: Run looks at the engine

	closeOnce sync.Once
	closeErr  error
	closed    chan struct{}
	writes    sync.RWMutex // held for reading by each write under way, so that Close can wait for them
}

// Open starts the embedded server, or connects to the external one, and
// returns when it can serve. A directory that another process has open is an
// Unavailable error which names that process.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Replicas == 0 {
		cfg.Replicas = 1
	}
	if cfg.Reserve == 0 {
		cfg.Reserve = 64 << 20
	}
	if cfg.URL == "" {
		cfg.Replicas = 1
	}
	s := &Store{cfg: cfg, log: cfg.Log, sick: make(chan struct{}, 1), closed: make(chan struct{})}
	if cfg.URL == "" {
		e, err := startEngine(cfg.Dir, cfg.Log)
		if err != nil {
			return nil, fmt.Errorf("open store: %w", err)
		}
		s.engine = e
	}
	if err := s.connect(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("open store: %w", err), s.engine.close())
	}
	return s, nil
}

func (s *Store) connect(ctx context.Context) error {
	opts := []nats.Option{
		nats.Name("m3od"),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(100 * time.Millisecond),
		nats.ReconnectJitter(50*time.Millisecond, 50*time.Millisecond),
		// No buffering while disconnected: a write that cannot be made now is
		// refused now, rather than made at some time after the caller gave up.
		nats.ReconnectBufSize(-1),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			s.log.Debug("store connection", "err", err)
		}),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				s.log.Warn("store disconnected", "err", err)
			}
		}),
		nats.ReconnectHandler(func(*nats.Conn) { s.log.Info("store reconnected") }),
	}
	url := s.cfg.URL
	if s.engine != nil {
		opts = append(opts, nats.InProcessServer(s.engine))
	} else if s.cfg.Creds != "" {
		opts = append(opts, nats.UserCredentials(s.cfg.Creds))
	}
	nc, err := nats.Connect(url, opts...)
	if err != nil {
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "cannot connect to the NATS server: " + err.Error(),
			Hint: "check the address and the credentials given by --nats", Err: err}
	}
	s.nc = nc
	if s.js, err = jetstream.New(nc, jetstream.WithDefaultTimeout(opTimeout)); err != nil {
		nc.Close()
		return fmt.Errorf("use jetstream: %w", err)
	}
	if s.engine != nil {
		return nil
	}
	info, err := s.js.AccountInfo(ctx)
	if err != nil {
		nc.Close()
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "the NATS server has no JetStream for this account",
			Hint: "enable JetStream for the account, or give other credentials", Err: err}
	}
	// Level 1 came with 2.11: per-message TTL (delete markers go away) and batched reads.
	if info.API.Level < 1 {
		nc.Close()
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "the NATS server is older than 2.11", Hint: "upgrade it"}
	}
	return nil
}

// Run looks after the store until ctx ends, then closes it. It restarts the
// embedded engine in place when that has given up after a disk fault, so that
// a full disk needs no restart of the daemon once there is room again.
func (s *Store) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return s.Close()
		case <-s.closed:
			return nil
		case <-s.sick:
			s.heal(ctx)
		}
	}
}

func (s *Store) heal(ctx context.Context) {
	if s.engine == nil || s.engine.healthy() {
		return
	}
	s.log.Warn("store engine stopped taking writes")
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		if free, err := freeBytes(s.cfg.Dir); err == nil && free > s.cfg.Reserve {
			err := s.engine.restart()
			if err == nil {
				s.log.Info("store engine restarted")
				return
			}
			s.log.Warn("store engine does not restart", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-s.closed:
			return
		case <-tick.C:
		}
	}
}

// Close refuses new writes, lets those under way finish, ends all watches and
// stops the embedded server. It may be called twice, and beside Run.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		close(s.closed)
		idle := make(chan struct{})
		go func() { // ends at the latest when nc.Close ends the writes
			s.writes.Lock()
			defer s.writes.Unlock()
			close(idle)
		}()
		select {
		case <-idle:
		case <-time.After(opTimeout):
		}
		s.nc.Close()
		<-idle
		s.closeErr = s.engine.close()
	})
	return s.closeErr
}

// begin admits a write. The caller calls end when it has been answered.
func (s *Store) begin() (end func(), err error) {
	s.writes.RLock()
	if s.isClosed() {
		s.writes.RUnlock()
		return nil, closedError(nil)
	}
	return s.writes.RUnlock, nil
}

func (s *Store) isClosed() bool {
	select {
	case <-s.closed:
		return true
	default:
		return false
	}
}

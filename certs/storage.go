package certs

import (
	"context"
	"crypto/rand"
	"fmt"
	"io/fs"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/store"
)

// storage is certmagic's view of the store: every daemon of an installation
// shares certificates, accounts and the locks that keep two of them from
// asking the CA for the same thing. Values are sealed.
type storage struct {
	cfg   Config
	blobs *store.Bucket[blob]
	locks *store.Bucket[lock]
	me    string

	mu   sync.Mutex // guards held
	held map[string]func()
}

var _ certmagic.Storage = (*storage)(nil)

// blob is one value at rest.
type blob struct {
	Box      []byte
	Size     int64
	Modified time.Time
}

// lock is held by its owner until it expires; who is alive extends it.
type lock struct {
	Owner   string
	Expires time.Time
}

// A lock outlives a daemon that died by this much.
const (
	lockLife  = 2 * time.Minute
	lockPause = 500 * time.Millisecond
)

func openStorage(ctx context.Context, cfg Config) (*storage, error) {
	s := &storage{cfg: cfg, me: rand.Text(), held: map[string]func(){}}
	var err error
	if s.blobs, err = store.NewBucket[blob](ctx, cfg.Store, "certs"); err != nil {
		return nil, fmt.Errorf("open certificates: %w", err)
	}
	if s.locks, err = store.NewBucket[lock](ctx, cfg.Store, "cert-locks"); err != nil {
		return nil, fmt.Errorf("open certificate locks: %w", err)
	}
	return s, nil
}

func where(key string) string { return "certificate " + key }

// missing makes NotFound what certmagic looks for.
func missing(key string, err error) error {
	if m3o.KindOf(err) == m3o.NotFound {
		return fmt.Errorf("%s: %w", key, fs.ErrNotExist)
	}
	return err
}

// Store implements certmagic.Storage.
func (s *storage) Store(ctx context.Context, key string, value []byte) error {
	box, err := s.cfg.Seal(m3o.Secret(value), where(key))
	if err != nil {
		return err
	}
	_, err = s.blobs.Put(ctx, key, blob{Box: box, Size: int64(len(value)), Modified: time.Now().UTC()})
	return err
}

// Load implements certmagic.Storage.
func (s *storage) Load(ctx context.Context, key string) ([]byte, error) {
	b, _, err := s.blobs.Get(ctx, key)
	if err != nil {
		return nil, missing(key, err)
	}
	v, err := s.cfg.Unseal(b.Box, where(key))
	return []byte(v.Reveal()), err
}

// under is every key in the directory key.
func (s *storage) under(ctx context.Context, key string) ([]string, error) {
	prefix := strings.TrimSuffix(key, "/") + "/"
	if key == "" {
		prefix = ""
	}
	entries, err := s.blobs.List(ctx, prefix)
	if err != nil {
		return nil, err
	}
	keys := make([]string, len(entries))
	for i, e := range entries {
		keys[i] = e.Key
	}
	return keys, nil
}

// Delete implements certmagic.Storage.
func (s *storage) Delete(ctx context.Context, key string) error {
	keys, err := s.under(ctx, key)
	if err != nil {
		return err
	}
	for _, k := range append(keys, key) {
		if err := s.blobs.Delete(ctx, k, 0); err != nil && m3o.KindOf(err) != m3o.NotFound {
			return err
		}
	}
	return nil
}

// Exists implements certmagic.Storage.
func (s *storage) Exists(ctx context.Context, key string) bool {
	_, err := s.Stat(ctx, key)
	return err == nil
}

// List implements certmagic.Storage.
func (s *storage) List(ctx context.Context, path string, recursive bool) ([]string, error) {
	keys, err := s.under(ctx, path)
	if err != nil {
		return nil, err
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("%s: %w", path, fs.ErrNotExist)
	}
	if recursive {
		return keys, nil
	}
	var out []string
	prefix := strings.TrimSuffix(path, "/") + "/"
	for _, k := range keys {
		name, _, _ := strings.Cut(strings.TrimPrefix(k, prefix), "/")
		if k = prefix + name; len(out) == 0 || out[len(out)-1] != k { // keys are in order
			out = append(out, k)
		}
	}
	return out, nil
}

// Stat implements certmagic.Storage.
func (s *storage) Stat(ctx context.Context, key string) (certmagic.KeyInfo, error) {
	b, _, err := s.blobs.Get(ctx, key)
	if err == nil {
		return certmagic.KeyInfo{Key: key, Modified: b.Modified, Size: b.Size, IsTerminal: true}, nil
	}
	if m3o.KindOf(err) != m3o.NotFound {
		return certmagic.KeyInfo{}, err
	}
	if keys, lerr := s.under(ctx, key); lerr != nil || len(keys) > 0 {
		return certmagic.KeyInfo{Key: key}, lerr
	}
	return certmagic.KeyInfo{}, missing(key, err)
}

// Lock implements certmagic.Storage.
func (s *storage) Lock(ctx context.Context, name string) error {
	for {
		rev, err := s.take(ctx, name)
		if err == nil {
			s.keep(name, rev)
			return nil
		}
		if m3o.KindOf(err) != m3o.Conflict {
			return fmt.Errorf("lock %s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("lock %s: %w", name, ctx.Err())
		case <-time.After(lockPause):
		}
	}
}

// take tries once.
func (s *storage) take(ctx context.Context, name string) (store.Rev, error) {
	mine := lock{Owner: s.me, Expires: time.Now().Add(lockLife)}
	rev, err := s.locks.Create(ctx, name, mine)
	if m3o.KindOf(err) != m3o.Conflict {
		return rev, err
	}
	had, old, gerr := s.locks.Get(ctx, name)
	if m3o.KindOf(gerr) == m3o.NotFound || gerr == nil && time.Now().Before(had.Expires) {
		return 0, err // the next try sees more
	}
	if gerr != nil {
		return 0, gerr
	}
	return s.locks.Update(ctx, name, mine, old)
}

// keep extends a lock until Unlock.
func (s *storage) keep(name string, rev store.Rev) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	s.mu.Lock()
	s.held[name] = func() { cancel(); <-done }
	s.mu.Unlock()
	go func() {
		defer close(done)
		t := time.NewTicker(lockLife / 4)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
				next, err := s.locks.Update(ctx, name, lock{Owner: s.me, Expires: time.Now().Add(lockLife)}, rev)
				if err != nil {
					return // somebody else has it, or the store is away: it expires
				}
				rev = next
			}
		}
	}()
}

// Unlock implements certmagic.Storage.
func (s *storage) Unlock(ctx context.Context, name string) error {
	s.mu.Lock()
	stop := s.held[name]
	delete(s.held, name)
	s.mu.Unlock()
	if stop != nil {
		stop()
	}
	l, rev, err := s.locks.Get(ctx, name)
	if m3o.KindOf(err) == m3o.NotFound || err == nil && l.Owner != s.me {
		return nil // it expired
	}
	if err != nil {
		return err
	}
	if err := s.locks.Delete(ctx, name, rev); err != nil && m3o.KindOf(err) != m3o.Conflict {
		return err
	}
	return nil
}

// Package auth says who somebody is and what they may do: users, SSH keys,
// tokens, the rules of each app, and one Allow that also writes the audit line.
//
// Nothing is allowed that no rule allows. Secrets are stored only as hashes.
// Who is asked often (whose key is this, is this token good) is answered from
// memory, which follows the store.
//
// It does not know HTTP, SSH connections or gRPC: callers bring it keys, tokens
// and names.
package auth

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/store"
)

// Auth is the platform's one authority. It is safe for concurrent use.
type Auth struct {
	log *slog.Logger
	now func() time.Time

	users  *mirror[User]
	keys   *mirror[Key]   // by fingerprint
	rules  *mirror[Rule]  // by app/user
	tokens *mirror[token] // by hash
	codes  *store.Bucket[bootstrap]
	audit  *store.Log

	// write makes one of checking and changing users and keys: that the last
	// admin keeps a key needs both. It is held across store calls.
	write sync.Mutex

	nonceKey [32]byte
	mu       sync.Mutex // guards spent
	spent    map[string]time.Time

	stop func()
	done sync.WaitGroup
}

// auditBytes bounds the audit log; at 200 bytes a line it is half a million lines.
const auditBytes = 100 << 20

// Open reads users, keys, rules and tokens from st and follows their changes
// until Close, or until the store is closed.
func Open(ctx context.Context, st *store.Store, log *slog.Logger) (*Auth, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	a := &Auth{log: log, now: func() time.Time { return time.Now().UTC() }, spent: map[string]time.Time{}}
	if _, err := rand.Read(a.nonceKey[:]); err != nil {
		return nil, fmt.Errorf("make nonce key: %w", err)
	}
	// The mirrors outlive the context of the start.
	wctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	a.stop = cancel
	err := func() (err error) {
		if a.users, err = follow[User](ctx, wctx, a, st, "users"); err != nil {
			return err
		}
		if a.keys, err = follow[Key](ctx, wctx, a, st, "keys"); err != nil {
			return err
		}
		if a.rules, err = follow[Rule](ctx, wctx, a, st, "rules"); err != nil {
			return err
		}
		if a.tokens, err = follow[token](ctx, wctx, a, st, "tokens"); err != nil {
			return err
		}
		if a.codes, err = store.NewBucket[bootstrap](ctx, st, "bootstrap"); err != nil {
			return err
		}
		a.audit, err = st.Log(ctx, "audit", store.LogOptions{MaxBytes: auditBytes})
		return err
	}()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open auth: %w", err), a.Close())
	}
	return a, nil
}

// Close stops following the store. Only Open's caller calls it, once nobody
// asks any more; closing the store first does no harm.
func (a *Auth) Close() error {
	a.stop()
	a.done.Wait()
	return nil
}

// A mirror is a bucket held in memory. Own writes are in it when they return;
// those of another process soon after.
type mirror[T any] struct {
	bucket *store.Bucket[T]

	mu sync.RWMutex // guards m
	m  map[string]held[T]
}

type held[T any] struct {
	rev  store.Rev
	v    T
	gone bool // deleted by us after rev; the store has not told yet
}

func follow[T any](ctx, wctx context.Context, a *Auth, st *store.Store, name string) (*mirror[T], error) {
	b, err := store.NewBucket[T](ctx, st, name)
	if err != nil {
		return nil, err
	}
	m := &mirror[T]{bucket: b, m: map[string]held[T]{}}
	ready := make(chan error, 1)
	a.done.Go(func() {
		for c, err := range b.Watch(wctx, "") {
			switch {
			case err != nil:
				// What we write ourselves is still seen. The store closing is how it ends.
				if m3o.KindOf(err) != m3o.Unavailable {
					a.log.Error("follow "+name, "err", err)
				}
				select {
				case ready <- err:
				default:
				}
				return
			case c.Synced:
				ready <- nil
			default:
				m.apply(c.Key, held[T]{rev: c.Rev, v: c.Value}, c.Deleted)
			}
		}
	})
	select {
	case err := <-ready:
		return m, err
	case <-ctx.Done():
		return nil, fmt.Errorf("read %s: %w", name, ctx.Err())
	}
}

// apply takes in a change unless a newer one is known.
func (m *mirror[T]) apply(key string, h held[T], deleted bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch old, ok := m.m[key]; {
	case ok && (old.rev > h.rev || old.rev == h.rev && old.gone):
	case deleted:
		delete(m.m, key)
	default:
		m.m[key] = h
	}
}

func (m *mirror[T]) get(key string) (T, store.Rev, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	h, ok := m.m[key]
	if !ok || h.gone {
		var zero T
		return zero, 0, false
	}
	return h.v, h.rev, true
}

// all is a copy of the records for which want holds, by key.
func (m *mirror[T]) all(want func(string, T) bool) map[string]T {
	m.mu.RLock()
	defer m.mu.RUnlock()
	found := map[string]T{}
	for k, h := range m.m {
		if !h.gone && want(k, h.v) {
			found[k] = h.v
		}
	}
	return found
}

func (m *mirror[T]) create(ctx context.Context, key string, v T) error {
	rev, err := m.bucket.Create(ctx, key, v)
	if err == nil {
		m.apply(key, held[T]{rev: rev, v: v}, false)
	}
	return err
}

func (m *mirror[T]) put(ctx context.Context, key string, v T) error {
	rev, err := m.bucket.Put(ctx, key, v)
	if err == nil {
		m.apply(key, held[T]{rev: rev, v: v}, false)
	}
	return err
}

func (m *mirror[T]) update(ctx context.Context, key string, v T, rev store.Rev) error {
	rev, err := m.bucket.Update(ctx, key, v, rev)
	if err == nil {
		m.apply(key, held[T]{rev: rev, v: v}, false)
	}
	return err
}

// remove deletes a record whatever its revision. Until it is known to be
// deleted it is still given: who asked for it hears of the failure and can ask
// again.
func (m *mirror[T]) remove(ctx context.Context, key string) error {
	if err := m.bucket.Delete(ctx, key, 0); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if h, ok := m.m[key]; ok {
		h.gone = true
		m.m[key] = h
	}
	return nil
}

func (m *mirror[T]) removeAll(ctx context.Context, want func(string, T) bool) error {
	var errs []error
	for k := range m.all(want) {
		errs = append(errs, m.remove(ctx, k))
	}
	return errors.Join(errs...)
}

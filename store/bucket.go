package store

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/m3o/m3o"
)

// A Rev is the revision of a record. It grows with every write of any record
// of the bucket and is never used twice, so a record that was deleted and made
// again has another one. 0 is the revision of nothing.
type Rev uint64

// A Bucket holds records of one type by key. A key is UTF-8 text, its segments
// separated by '/': "hello/3". Values are kept as JSON, of at most MaxValue
// bytes; fields a newer version added are ignored on reading. Only the last
// value of a key is kept. It is safe for concurrent use.
type Bucket[T any] struct {
	s      *Store
	name   string
	kv     jetstream.KeyValue
	stream string
	pre    string // what stands before the encoded key in a subject
}

// An Entry is one record as read.
type Entry[T any] struct {
	Key   string
	Rev   Rev
	Value T
}

// A Change is one step of a Watch: a record that is or became so, a record
// that was deleted (Deleted, no Value), or the mark that all records there were
// have been given (Synced, nothing else).
type Change[T any] struct {
	Entry[T]
	Deleted bool
	Synced  bool
}

// markerTTL is how long the trace of a deleted record is kept, so that a watch
// that was cut off learns of the deletion.
const markerTTL = 24 * time.Hour

var streamName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,40}$`)

// NewBucket opens the bucket called name (a-z, 0-9, hyphens) and makes it when
// it is missing.
func NewBucket[T any](ctx context.Context, s *Store, name string) (*Bucket[T], error) {
	if !streamName.MatchString(name) {
		return nil, fmt.Errorf("bad bucket name %q", name)
	}
	cfg := jetstream.KeyValueConfig{
		Bucket:         prefix + name,
		History:        1,
		MaxValueSize:   MaxValue + 4096, // the engine counts the headers
		Storage:        jetstream.FileStorage,
		Replicas:       s.cfg.Replicas,
		LimitMarkerTTL: markerTTL,
	}
	kv, err := s.js.KeyValue(ctx, cfg.Bucket)
	if err != nil || !sameBucket(ctx, kv, cfg) {
		// Not always: it writes and syncs the bucket's description anew.
		kv, err = s.js.CreateOrUpdateKeyValue(ctx, cfg)
	}
	if err != nil {
		return nil, s.fail(ctx, "open bucket "+name, err)
	}
	return &Bucket[T]{s: s, name: name, kv: kv, stream: "KV_" + prefix + name, pre: "$KV." + prefix + name + "."}, nil
}

func sameBucket(ctx context.Context, kv jetstream.KeyValue, want jetstream.KeyValueConfig) bool {
	st, err := kv.Status(ctx)
	if err != nil {
		return false
	}
	have := st.Config()
	return have.History == want.History && have.MaxValueSize == want.MaxValueSize && have.Storage == want.Storage &&
		have.Replicas == want.Replicas && have.LimitMarkerTTL == want.LimitMarkerTTL
}

// Get reads one record. A key that is not there is NotFound.
func (b *Bucket[T]) Get(ctx context.Context, key string) (T, Rev, error) {
	var v T
	enc, err := encodeKey(key)
	if err != nil {
		return v, 0, err
	}
	e, err := b.kv.Get(ctx, enc)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return v, 0, &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s has no record %q", b.name, key)}
	}
	if err != nil {
		return v, 0, b.fail(ctx, "read", key, err)
	}
	if err := b.decode(key, e.Value(), &v); err != nil {
		return v, 0, err
	}
	return v, Rev(e.Revision()), nil
}

// Create writes a record that must not be there yet; else Conflict.
func (b *Bucket[T]) Create(ctx context.Context, key string, v T) (Rev, error) {
	return b.write(ctx, key, v, func(enc string, data []byte) (uint64, error) {
		return b.kv.Create(ctx, enc, data)
	})
}

// Update replaces the record read at rev; Conflict when it has been changed,
// made or deleted since. With rev 0 the key must have no record and no recent
// deletion: use Create for that.
func (b *Bucket[T]) Update(ctx context.Context, key string, v T, rev Rev) (Rev, error) {
	return b.write(ctx, key, v, func(enc string, data []byte) (uint64, error) {
		return b.kv.Update(ctx, enc, data, uint64(rev))
	})
}

// Put writes a record whatever was there before.
func (b *Bucket[T]) Put(ctx context.Context, key string, v T) (Rev, error) {
	return b.write(ctx, key, v, func(enc string, data []byte) (uint64, error) {
		return b.kv.Put(ctx, enc, data)
	})
}

func (b *Bucket[T]) write(ctx context.Context, key string, v T, put func(string, []byte) (uint64, error)) (Rev, error) {
	enc, err := encodeKey(key)
	if err != nil {
		return 0, err
	}
	data, err := json.Marshal(v)
	if err != nil {
		return 0, fmt.Errorf("encode %s/%s: %w", b.name, key, err)
	}
	if len(data) > MaxValue {
		return 0, fmt.Errorf("write %s/%s: %w", b.name, key, tooBig())
	}
	end, err := b.s.begin()
	if err != nil {
		return 0, fmt.Errorf("write %s/%s: %w", b.name, key, err)
	}
	defer end()
	if err := b.s.room(); err != nil {
		return 0, fmt.Errorf("write %s/%s: %w", b.name, key, err)
	}
	rev, err := put(enc, data)
	if err != nil {
		return 0, b.fail(ctx, "write", key, err)
	}
	return Rev(rev), nil
}

// Delete removes the record read at rev; Conflict when it changed since. With
// rev 0 it removes whatever is there, also nothing.
func (b *Bucket[T]) Delete(ctx context.Context, key string, rev Rev) error {
	enc, err := encodeKey(key)
	if err != nil {
		return err
	}
	end, err := b.s.begin()
	if err != nil {
		return fmt.Errorf("delete %s/%s: %w", b.name, key, err)
	}
	defer end()
	opts := []jetstream.KVDeleteOpt{jetstream.PurgeTTL(markerTTL)}
	if rev != 0 {
		opts = append(opts, jetstream.LastRevision(uint64(rev)))
	}
	// No look at the room: deleting is how room is made, and a marker is small.
	if err := b.kv.Purge(ctx, enc, opts...); err != nil {
		return b.fail(ctx, "delete", key, err)
	}
	return nil
}

// List reads the records whose key begins with prefix ("" for all), in the
// order of their keys. It costs a round trip for every thousand; records that
// change meanwhile are given as they were or as they became.
func (b *Bucket[T]) List(ctx context.Context, prefix string) ([]Entry[T], error) {
	found := map[string]message{}
	err := b.s.scan(ctx, b.stream, b.pre+prefixFilter(prefix), 1, func(m message) error {
		key, err := decodeKey(strings.TrimPrefix(m.subject, b.pre))
		switch {
		case err != nil:
			return err
		case !strings.HasPrefix(key, prefix):
		case m.deleted():
			delete(found, key)
		default:
			found[key] = m
		}
		return nil
	})
	if err != nil {
		return nil, b.fail(ctx, "list", prefix, err)
	}
	list := make([]Entry[T], 0, len(found))
	for key, m := range maps.All(found) {
		e := Entry[T]{Key: key, Rev: Rev(m.seq)}
		if err := b.decode(key, m.data, &e.Value); err != nil {
			return nil, err
		}
		list = append(list, e)
	}
	slices.SortFunc(list, func(x, y Entry[T]) int { return cmp.Compare(x.Key, y.Key) })
	return list, nil
}

// Watch gives every record whose key begins with prefix, then one Change with
// Synced set, then each change as it is made, in the order of the writes. A
// record that changes quickly may be given only as it became. It carries on
// after the server was away, and ends without an error when ctx ends; any other
// end is given as an error.
func (b *Bucket[T]) Watch(ctx context.Context, prefix string) iter.Seq2[Change[T], error] {
	return func(yield func(Change[T], error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		var given map[string]bool = map[string]bool{} // keys, until synced
		send := func(c Change[T]) error {
			if !yield(c, nil) {
				return errStop
			}
			return nil
		}
		err := b.s.follow(ctx, b.stream, b.pre+prefixFilter(prefix), 1, func(m message) error {
			key, err := decodeKey(strings.TrimPrefix(m.subject, b.pre))
			if err != nil {
				return err
			}
			if !strings.HasPrefix(key, prefix) {
				return nil
			}
			c := Change[T]{Entry: Entry[T]{Key: key, Rev: Rev(m.seq)}}
			if m.deleted() {
				// Old deletions are no news to who has seen nothing yet.
				if given != nil && !given[key] {
					return nil
				}
				c.Deleted = true
				return send(c)
			}
			if given != nil {
				given[key] = true
			}
			if err := b.decode(key, m.data, &c.Value); err != nil {
				return err
			}
			return send(c)
		}, func() error {
			given = nil
			return send(Change[T]{Synced: true})
		})
		if err != nil && !errors.Is(err, errStop) && ctx.Err() == nil {
			yield(Change[T]{}, b.fail(ctx, "watch", prefix, err))
		}
	}
}

func (b *Bucket[T]) decode(key string, data []byte, v *T) error {
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("decode %s/%s: %w", b.name, key, err)
	}
	return nil
}

func (b *Bucket[T]) fail(ctx context.Context, verb, key string, err error) error {
	what := fmt.Sprintf("%s %s/%s", verb, b.name, key)
	if errors.Is(err, jetstream.ErrKeyExists) || errors.Is(err, jetstream.ErrKeyRevisionMismatch) {
		return fmt.Errorf("%s: %w", what, &m3o.Error{Kind: m3o.Conflict,
			Msg: fmt.Sprintf("%s record %q has changed meanwhile", b.name, key), Hint: "try again", Err: err})
	}
	return b.s.fail(ctx, what, err)
}

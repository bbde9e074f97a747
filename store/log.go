package store

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// LogOptions bound a log; the oldest records go first. Zero means no bound.
type LogOptions struct {
	MaxBytes      int64         // of the whole log
	MaxAge        time.Duration // of a record
	MaxPerSubject int64         // records of one subject

	// Relaxed acknowledges an append before it is on the disk: kill -9 may lose
	// the last of them, and thousands a second are possible. For the output of
	// apps, not for what the platform answers for. It holds from the log's
	// creation on.
	Relaxed bool
}

// A Log is an append-only sequence of records, each under a subject. Subjects
// are like keys: UTF-8 segments separated by '/'. It is safe for concurrent use.
type Log struct {
	s      *Store
	name   string
	stream string
	pre    string
}

// A Record is one line of a Log. Seq grows by at least one from record to
// record over all subjects.
type Record struct {
	Seq     uint64
	Time    time.Time // when it was stored, UTC
	Subject string
	Data    []byte
}

// Log opens the log called name (a-z, 0-9, hyphens), made when it is missing,
// with these bounds from now on.
func (s *Store) Log(ctx context.Context, name string, o LogOptions) (*Log, error) {
	if !streamName.MatchString(name) {
		return nil, fmt.Errorf("bad log name %q", name)
	}
	l := &Log{s: s, name: name, stream: prefix + "log-" + name, pre: "m3o.log." + name + "."}
	cfg := jetstream.StreamConfig{
		Name:              l.stream,
		Subjects:          []string{l.pre + ">"},
		Storage:           jetstream.FileStorage,
		Replicas:          s.cfg.Replicas,
		Discard:           jetstream.DiscardOld,
		MaxBytes:          orUnlimited(o.MaxBytes),
		MaxMsgsPerSubject: orUnlimited(o.MaxPerSubject),
		MaxMsgs:           -1,
		MaxMsgSize:        MaxValue + 4096,
		MaxAge:            o.MaxAge,
		AllowDirect:       true,
		DenyDelete:        true,
	}
	if o.Relaxed {
		cfg.PersistMode = jetstream.AsyncPersistMode
	}
	if st, err := s.js.Stream(ctx, l.stream); err == nil && sameStream(st.CachedInfo().Config, cfg) {
		return l, nil
	}
	if _, err := s.js.CreateOrUpdateStream(ctx, cfg); err != nil {
		return nil, s.fail(ctx, "open log "+name, err)
	}
	return l, nil
}

func sameStream(have, want jetstream.StreamConfig) bool {
	return slices.Equal(have.Subjects, want.Subjects) && have.Storage == want.Storage && have.Replicas == want.Replicas &&
		have.Discard == want.Discard && have.MaxBytes == want.MaxBytes && have.MaxMsgsPerSubject == want.MaxMsgsPerSubject &&
		have.MaxMsgs == want.MaxMsgs && have.MaxMsgSize == want.MaxMsgSize && have.MaxAge == want.MaxAge &&
		have.AllowDirect == want.AllowDirect && have.DenyDelete == want.DenyDelete && have.PersistMode == want.PersistMode
}

func orUnlimited(n int64) int64 {
	if n == 0 {
		return -1
	}
	return n
}

// Append adds one record of at most MaxValue bytes and returns its number.
func (l *Log) Append(ctx context.Context, subject string, data []byte) (uint64, error) {
	what := "append to " + l.name + "/" + subject
	enc, err := encodeKey(subject)
	if err != nil {
		return 0, err
	}
	if len(data) > MaxValue {
		return 0, fmt.Errorf("%s: %w", what, tooBig())
	}
	end, err := l.s.begin()
	if err != nil {
		return 0, fmt.Errorf("%s: %w", what, err)
	}
	defer end()
	if err := l.s.room(); err != nil {
		return 0, fmt.Errorf("%s: %w", what, err)
	}
	ack, err := l.s.js.Publish(ctx, l.pre+enc, data)
	if err != nil {
		return 0, l.s.fail(ctx, what, err)
	}
	return ack.Sequence, nil
}

// Read gives the records of subject from number from on (0 for all), then,
// with follow, each as it is added, until ctx ends, which is no error then. A subject that
// ends in '/' stands for all subjects that begin with it, and "" for all.
func (l *Log) Read(ctx context.Context, subject string, from uint64, follow bool) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		filter, err := l.filter(subject)
		if err != nil {
			yield(Record{}, err)
			return
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		emit := func(m message) error {
			sub, err := decodeKey(strings.TrimPrefix(m.subject, l.pre))
			if err != nil {
				return err
			}
			if !yield(Record{Seq: m.seq, Time: m.time.UTC(), Subject: sub, Data: m.data}, nil) {
				return errStop
			}
			return nil
		}
		if follow {
			err = l.s.follow(ctx, l.stream, filter, from, emit, func() error { return nil })
		} else {
			err = l.s.scan(ctx, l.stream, filter, from, emit)
		}
		if err != nil && !errors.Is(err, errStop) && (!follow || ctx.Err() == nil) {
			yield(Record{}, l.s.fail(ctx, "read "+l.name+"/"+subject, err))
		}
	}
}

// Tail is Read from the last n records of subject on; records added while it
// starts are given too.
func (l *Log) Tail(ctx context.Context, subject string, n int, follow bool) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		from, err := l.tailStart(ctx, subject, n)
		if err != nil {
			if !follow || ctx.Err() == nil {
				yield(Record{}, l.s.fail(ctx, "read "+l.name+"/"+subject, err))
			}
			return
		}
		l.Read(ctx, subject, from, follow)(yield)
	}
}

// tailStart finds the number at or after which subject has n records, by
// bisection: the engine can count from a number on but not walk backwards.
func (l *Log) tailStart(ctx context.Context, subject string, n int) (uint64, error) {
	filter, err := l.filter(subject)
	if err != nil {
		return 0, err
	}
	st, err := l.s.js.Stream(ctx, l.stream)
	if err != nil {
		return 0, err
	}
	state := st.CachedInfo().State
	lo, hi := max(state.FirstSeq, 1), state.LastSeq+1
	if n <= 0 {
		return hi, nil
	}
	count := func(from uint64) (uint64, error) {
		got := uint64(0)
		pending, err := l.s.batch(ctx, l.stream, filter, from, 1, func(message) error { got++; return nil })
		return got + pending, err
	}
	for lo+1 < hi {
		mid := lo + (hi-lo)/2
		c, err := count(mid)
		if err != nil {
			return 0, err
		}
		if c >= uint64(n) {
			lo = mid
		} else {
			hi = mid
		}
	}
	return lo, nil
}

// Purge removes all records of subject, with the meaning of subject in Read.
func (l *Log) Purge(ctx context.Context, subject string) error {
	what := "purge " + l.name + "/" + subject
	filter, err := l.filter(subject)
	if err != nil {
		return err
	}
	st, err := l.s.js.Stream(ctx, l.stream)
	if err != nil {
		return l.s.fail(ctx, what, err)
	}
	if err := st.Purge(ctx, jetstream.WithPurgeSubject(filter)); err != nil {
		return l.s.fail(ctx, what, err)
	}
	return nil
}

func (l *Log) filter(subject string) (string, error) {
	if subject == "" || strings.HasSuffix(subject, "/") {
		return l.pre + prefixFilter(subject), nil
	}
	enc, err := encodeKey(subject)
	return l.pre + enc, err
}

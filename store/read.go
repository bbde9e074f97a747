package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// A message is one stored message of a stream, however it was read.
type message struct {
	subject string
	seq     uint64
	time    time.Time
	header  nats.Header
	data    []byte
}

// deleted reports whether the message is a key-value delete marker.
func (m message) deleted() bool {
	switch m.header.Get("KV-Operation") {
	case "DEL", "PURGE":
		return true
	}
	return m.header.Get("Nats-Marker-Reason") != ""
}

const (
	batchMessages = 1000
	batchBytes    = 8 << 20
)

// batch reads stored messages whose subject matches filter, from sequence
// number from on, at most limit of them, and says how many more there are.
// It is the stateless read of NATS ADR-31: no consumer is made, so a list costs
// one round trip and leaves nothing behind.
func (s *Store) batch(ctx context.Context, stream, filter string, from uint64, limit int, emit func(message) error) (pending uint64, err error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, opTimeout)
		defer cancel()
	}
	req, err := json.Marshal(map[string]any{
		"seq": max(from, 1), "next_by_subj": filter, "batch": limit, "max_bytes": batchBytes,
	})
	if err != nil {
		return 0, err
	}
	inbox := s.nc.NewRespInbox()
	sub, err := s.nc.SubscribeSync(inbox)
	if err != nil {
		return 0, err
	}
	defer func() { _ = sub.Unsubscribe() }() // fails only when the connection is gone
	if err := s.nc.PublishRequest("$JS.API.DIRECT.GET."+stream, inbox, req); err != nil {
		return 0, err
	}
	for {
		msg, err := sub.NextMsgWithContext(ctx)
		if err != nil {
			return 0, err
		}
		switch status := msg.Header.Get("Status"); status {
		case "":
		case "204": // end of batch
			n, err := strconv.ParseUint(msg.Header.Get("Nats-Num-Pending"), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("read end of batch: %w", err)
			}
			return n, nil
		case "404":
			return 0, nil
		case "503":
			return 0, nats.ErrNoResponders
		default:
			return 0, fmt.Errorf("read %s: status %s %s", stream, status, msg.Header.Get("Description"))
		}
		m := message{subject: msg.Header.Get("Nats-Subject"), header: msg.Header, data: msg.Data}
		if m.seq, err = strconv.ParseUint(msg.Header.Get("Nats-Sequence"), 10, 64); err != nil {
			return 0, fmt.Errorf("read sequence: %w", err)
		}
		if m.time, err = time.Parse(time.RFC3339Nano, msg.Header.Get("Nats-Time-Stamp")); err != nil {
			return 0, fmt.Errorf("read time: %w", err)
		}
		if err := emit(m); err != nil {
			return 0, err
		}
	}
}

// scan reads all stored messages from sequence number from on, in order.
func (s *Store) scan(ctx context.Context, stream, filter string, from uint64, emit func(message) error) error {
	for {
		pending, err := s.batch(ctx, stream, filter, from, batchMessages, func(m message) error {
			from = m.seq + 1
			return emit(m)
		})
		if err != nil || pending == 0 {
			return err
		}
	}
}

// errStop is how an emit function ends a read early.
var errStop = errors.New("stop")

// follow gives what is stored from sequence number from on, then calls
// caughtUp once, then gives what is added, until ctx ends or emit or caughtUp
// fail. It survives the server going away and coming back: it takes up again
// after the last message it gave, however long that takes.
func (s *Store) follow(ctx context.Context, stream, filter string, from uint64, emit func(message) error, caughtUp func() error) error {
	f := follower{s: s, stream: stream, filter: filter, next: max(from, 1), emit: emit, caughtUp: caughtUp}
	wait := 50 * time.Millisecond
	for {
		before := f.next
		err := f.once(ctx)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case s.isClosed():
			return nats.ErrConnectionClosed
		case f.done != nil:
			return f.done
		case errors.Is(err, jetstream.ErrStreamNotFound):
			return err
		}
		s.log.Debug("store watch interrupted", "err", err)
		if f.next != before {
			wait = 50 * time.Millisecond
		}
		select {
		case <-ctx.Done():
		case <-s.closed:
		case <-time.After(wait):
		}
		wait = min(2*wait, 2*time.Second)
	}
}

type follower struct {
	s              *Store
	stream, filter string
	next           uint64
	emit           func(message) error
	caughtUp       func() error // nil once called
	done           error        // what emit or caughtUp said: the end
}

// once makes a consumer and follows it until something breaks.
func (f *follower) once(ctx context.Context) error {
	cctx, cancel := context.WithTimeout(ctx, opTimeout)
	cons, err := f.s.js.OrderedConsumer(cctx, f.stream, jetstream.OrderedConsumerConfig{
		FilterSubjects:    []string{f.filter},
		DeliverPolicy:     jetstream.DeliverByStartSequencePolicy,
		OptStartSeq:       f.next,
		InactiveThreshold: 30 * time.Second,
		MaxResetAttempts:  1, // follow does the retrying, with the caller's context
	})
	cancel()
	if err != nil {
		return err
	}
	it, err := cons.Messages(jetstream.PullHeartbeat(5 * time.Second))
	if err != nil {
		return err
	}
	defer func() {
		it.Stop()
		if f.s.isClosed() || !f.s.nc.IsConnected() {
			return
		}
		// The server forgets it after a while; many short watches should not wait for that.
		dctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = f.s.js.DeleteConsumer(dctx, f.stream, cons.CachedInfo().Name)
	}()
	if f.caughtUp != nil && cons.CachedInfo().NumPending == 0 && !f.reached() {
		return nil
	}
	for {
		msg, err := it.Next(jetstream.NextContext(ctx))
		if err != nil {
			return err
		}
		meta, err := msg.Metadata()
		if err != nil {
			return fmt.Errorf("read metadata: %w", err)
		}
		f.next = meta.Sequence.Stream + 1
		m := message{subject: msg.Subject(), seq: meta.Sequence.Stream, time: meta.Timestamp, header: msg.Headers(), data: msg.Data()}
		if f.done = f.emit(m); f.done != nil {
			return nil
		}
		if f.caughtUp != nil && meta.NumPending == 0 && !f.reached() {
			return nil
		}
	}
}

// reached says that all that was stored has been given, once.
func (f *follower) reached() bool {
	f.done = f.caughtUp()
	f.caughtUp = nil
	return f.done == nil
}

package store

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sys/unix"

	"github.com/m3o/m3o"
)

// Server error codes nats.go has no name for (nats-server server/errors.json).
const (
	codeInsufficientResources jetstream.ErrorCode = 10023
	codeStorageExceeded       jetstream.ErrorCode = 10047
	codeStreamStoreFailed     jetstream.ErrorCode = 10077
)

// room refuses a write that would eat into the reserve. The engine stops a
// stream for good when the disk refuses it a byte, so it must not come to that.
func (s *Store) room() error {
	if s.engine == nil {
		return nil
	}
	free, err := freeBytes(s.cfg.Dir)
	if err != nil {
		return err
	}
	if free < s.cfg.Reserve {
		return diskFull(s.cfg.Dir, fmt.Errorf("%d bytes free, %d are reserved", free, s.cfg.Reserve))
	}
	return nil
}

func closedError(err error) error {
	return &m3o.Error{Kind: m3o.Unavailable, Msg: "the state store is closed", Err: err}
}

func diskFull(dir string, err error) error {
	where := "of the NATS server"
	if dir != "" {
		where = "of " + dir
	}
	return &m3o.Error{Kind: m3o.Unavailable, Msg: "disk full: the file system " + where + " has no room for a write",
		Hint: "free some space there; m3od carries on by itself", Err: err}
}

// diskError is err, or disk full when that is what err is about.
func diskError(dir string, err error) error {
	if errors.Is(err, unix.ENOSPC) || strings.Contains(err.Error(), "no space left") {
		return diskFull(dir, err)
	}
	return err
}

// fail turns an error of the engine into one a caller can act on. what is a
// verb phrase: "write apps/hello".
func (s *Store) fail(ctx context.Context, what string, err error) error {
	unavailable := func(msg, hint string) error {
		return fmt.Errorf("%s: %w", what, &m3o.Error{Kind: m3o.Unavailable, Msg: msg, Hint: hint, Err: err})
	}
	var api *jetstream.APIError
	switch {
	case err == nil:
		return nil
	case errors.Is(ctx.Err(), context.Canceled):
		return fmt.Errorf("%s: %w", what, ctx.Err())
	case s.isClosed(), errors.Is(err, nats.ErrConnectionClosed):
		return fmt.Errorf("%s: %w", what, closedError(err))
	case errors.Is(err, nats.ErrMaxPayload):
		return fmt.Errorf("%s: %w", what, tooBig())
	case isSilence(err):
	case errors.As(err, &api):
		switch api.ErrorCode {
		case codeInsufficientResources, codeStorageExceeded:
			return fmt.Errorf("%s: %w", what, diskFull(s.cfg.Dir, err))
		case codeStreamStoreFailed:
			return fmt.Errorf("%s: %w", what, diskError(s.cfg.Dir, err))
		}
		return fmt.Errorf("%s: %w", what, err)
	default:
		return fmt.Errorf("%s: %w", what, err)
	}
	full := s.engine != nil && s.engine.full() // before Run restarts it
	select {
	case s.sick <- struct{}{}:
	default:
	}
	if ferr := s.room(); ferr != nil {
		return fmt.Errorf("%s: %w", what, ferr)
	}
	if full {
		return fmt.Errorf("%s: %w", what, diskFull(s.cfg.Dir, err))
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", what, ctx.Err())
	}
	if s.engine != nil {
		return unavailable("the state store does not answer", "see the log of m3od; is the disk well?")
	}
	return unavailable("the NATS server does not answer", "check that it runs and can be reached")
}

// isSilence reports whether err says that nobody answered, or not in time. A
// write that ends so may have been made or not.
func isSilence(err error) bool {
	for _, e := range []error{context.DeadlineExceeded, nats.ErrTimeout, nats.ErrNoResponders, nats.ErrDisconnected,
		nats.ErrReconnectBufExceeded, nats.ErrNoServers, jetstream.ErrNoStreamResponse, jetstream.ErrNoHeartbeat,
		jetstream.ErrJetStreamNotEnabled, jetstream.ErrJetStreamNotEnabledForAccount} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func tooBig() error {
	return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("value is larger than %d bytes", MaxValue),
		Hint: "keep large data in files or an object store"}
}

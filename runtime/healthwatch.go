package runtime

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

// watchHealth calls grpc.health.v1.Health/Watch and gives a token whenever the
// server tells of a change. The channel is closed when ctx has ended or the
// server does not know the method; who gets it reads until then. A stream that
// told that the server is not well is ended by us, or a server that shuts down
// gracefully would wait for it.
func watchHealth(ctx context.Context, addr, service string) <-chan struct{} {
	told := make(chan struct{})
	go func() {
		defer close(told)
		for {
			err := watchOnce(ctx, addr, service, func() {
				select {
				case told <- struct{}{}:
				case <-ctx.Done():
				}
			})
			if ctx.Err() != nil || errors.Is(err, errNoHealth) || !sleep(ctx, watchAgain) {
				return
			}
		}
	}()
	return told
}

// watchOnce follows one stream until it ends. The first answer is what is
// known already.
func watchOnce(ctx context.Context, addr, service string, tell func()) error {
	c, finish := client(true)
	defer finish()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	resp, err := healthCall(ctx, c, addr, "Watch", service)
	if err != nil {
		return err
	}
	defer resp.Body.Close() //nolint:errcheck // given up
	if !strings.HasPrefix(resp.Header.Get("Content-Type"), "application/grpc") {
		return errNoHealth
	}
	for first := true; ; first = false {
		n, err := readServing(resp.Body)
		if err != nil {
			if code, serr := grpcStatus(resp); serr == nil && code == unimplemented {
				return errNoHealth
			}
			if !first {
				tell() // it may have ended with the server
			}
			return err
		}
		if n != 1 {
			cancel()
			tell()
			return nil
		}
		if !first {
			tell()
		}
	}
}

// readServing reads one HealthCheckResponse from a stream.
func readServing(r io.Reader) (uint64, error) {
	head := make([]byte, 5)
	if _, err := io.ReadFull(r, head); err != nil {
		return 0, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n > 4<<10 {
		return 0, fmt.Errorf("an answer of %d bytes", n)
	}
	msg := append(head, make([]byte, n)...)
	if _, err := io.ReadFull(r, msg[5:]); err != nil {
		return 0, err
	}
	return servingStatus(msg)
}

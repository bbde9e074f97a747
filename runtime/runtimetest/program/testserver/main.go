// Command testserver is package program as a static binary for container images.
package main

import (
	"context"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/m3o/m3o/runtime/runtimetest/program"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	code := program.Main(ctx, program.Process{Args: os.Args[1:], Env: os.Getenv,
		In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Listen: net.Listen})
	stop()
	os.Exit(code)
}

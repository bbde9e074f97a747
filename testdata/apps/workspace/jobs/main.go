// Jobs is the worker of the workspace: it tells every minute that it is there.
package main

import (
	"context"
	"log"
	"os/signal"
	"syscall"
	"time"

	"example.com/workspace/lib"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		log.Println(lib.Name, "works")
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// Worker is the process type that works and listens on no port.
package main

import (
	"context"
	"flag"
	"log"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	every := flag.Duration("every", time.Second, "time between two jobs")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	tick := time.NewTicker(*every)
	defer tick.Stop()
	for n := 1; ; n++ {
		log.Printf("worker did job %d", n)
		select {
		case <-tick.C:
		case <-ctx.Done():
			log.Print("worker stopped")
			return
		}
	}
}

package main

import (
	"os"
	"time"
)

// Windows tells nobody of a new size, so it is asked for twice a second: a
// size that is sent again changes nothing.
func (stdScreen) resized() (changes <-chan os.Signal, stop func()) {
	c, end := make(chan os.Signal, 1), make(chan struct{})
	go func() {
		t := time.NewTicker(500 * time.Millisecond)
		defer t.Stop()
		for {
			select {
			case <-end:
				return
			case <-t.C:
				select {
				case c <- os.Interrupt: // any value will do
				default:
				}
			}
		}
	}()
	return c, func() { close(end) }
}

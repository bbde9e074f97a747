package runtime

import (
	"math/rand/v2"
	"time"
)

const (
	firstPause = 200 * time.Millisecond
	longPause  = time.Minute
	// settled is how long an instance must have been ready for its past
	// crashes to be forgiven.
	settled = 30 * time.Second
)

// pause is how long to wait before the nth restart in a row (from 0): doubling
// from firstPause to longPause, give or take a fifth so that the instances of
// an app that fell together do not come back together.
func pause(n int) time.Duration {
	d := longPause
	if n < 9 { // 200 ms << 9 is more than a minute
		d = min(firstPause<<max(n, 0), longPause)
	}
	return d - d/5 + rand.N(d*2/5)
}

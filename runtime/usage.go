package runtime

import (
	"time"

	"github.com/m3o/m3o"
)

// Usage is what an instance uses.
type Usage struct {
	At          time.Time
	CPU         time.Duration // since this launch of it
	MemoryBytes int64         // now, without file contents the kernel can drop at once
	MemoryLimit int64         // 0: none
	CPULimit    int64         // thousandths of a core; 0: none
	Pids        int64         // processes and threads now
	OOMKills    int64         // processes of this launch that the kernel killed for memory
}

// A Meter is a Driver that can tell what its instances use. Those built on a
// Reconciler are, as far as their host can measure.
type Meter interface {
	// Usage is NotFound when there is no such instance, Unavailable when it
	// does not run or cannot be measured.
	Usage(instance string) (Usage, error)
}

// A Metered Handle can be measured.
type Metered interface{ Usage() (Usage, error) }

// Usage is Meter.Usage.
func (r *Reconciler) Usage(id string) (Usage, error) {
	w, h, err := r.Workload(id)
	if err != nil {
		return Usage{}, err
	}
	m, ok := h.(Metered)
	if !ok {
		return Usage{}, m3o.Errorf(m3o.Unavailable, "this driver does not measure")
	}
	u, err := m.Usage()
	if err != nil {
		return u, &m3o.Error{Kind: m3o.Unavailable, Msg: "instance " + id + " cannot be measured", Err: err}
	}
	if u.MemoryLimit == 0 {
		u.MemoryLimit = w.MemoryBytes
	}
	u.At, u.CPULimit = time.Now(), w.CPUMillis
	return u, nil
}

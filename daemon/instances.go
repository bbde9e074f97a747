package daemon

import (
	"context"
	"fmt"
	"time"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/runtime"
)

// loops is how many exits in a row make a crash loop.
const loops = 2

// lastWords is how many lines of the log of an instance in a crash loop are
// shown with it.
const lastWords = 20

// instance tells of an instance what an operator wants to know: what it uses
// and what, if anything, is wrong with it.
func (d *Daemon) instance(ctx context.Context, in m3o.Instance) *m3ov1.Instance {
	w := &m3ov1.Instance{Id: in.ID, Process: in.Process, Release: m3o.Release{Version: in.Release}.Name(),
		Phase: string(in.Phase), Restarts: int32(in.Restarts), Exit: int32(in.Exit), Oom: in.OOM, Since: stamp(in.At), Address: in.Addr}
	rep, err := d.driver.Explain(in.ID)
	if err != nil {
		return w // it has gone meanwhile
	}
	w.Crashes, w.NextStart = int32(rep.Crashes), stamp(rep.Next)
	w.MemoryLimit, w.CpuLimit = rep.Workload.MemoryBytes, rep.Workload.CPUMillis
	w.Why = whyWords(in, rep)
	if rep.Crashes >= loops && in.Phase != m3o.Ready {
		w.Phase = "crashing"
		for l, err := range d.driver.Logs(ctx, refOf(in), 4*lastWords, false) {
			if err != nil {
				break
			}
			if l.Instance == in.ID {
				w.LastLines = append(w.LastLines, l.Text)
			}
		}
		w.LastLines = w.LastLines[max(0, len(w.LastLines)-lastWords):]
	}
	if u, err := d.driver.Usage(in.ID); err == nil {
		s := d.usages.see(in.ID, u)
		w.Cpu, w.MemoryBytes, w.MemoryLimit, w.Pids = s.cpu, s.MemoryBytes, s.MemoryLimit, s.Pids
	}
	return w
}

// whyWords say in one line why an instance does not serve, "" when it does.
func whyWords(in m3o.Instance, rep runtime.Report) string {
	var why string
	last := m3o.Instance{Exit: rep.Last.Code, OOM: rep.Last.OOM}
	switch {
	case in.Phase == m3o.Ready || in.Phase == m3o.Draining:
		return ""
	case rep.Why != nil:
		why = firstLine(rep.Why.Error())
	case !rep.Last.At.IsZero():
		why = crashWords(last)
	}
	if rep.Crashes >= loops {
		why += fmt.Sprintf(", %d times in a row", rep.Crashes)
	}
	if wait := time.Until(rep.Next); !rep.Next.IsZero() && wait > 0 {
		why += fmt.Sprintf("; starts again in %v", wait.Round(time.Second))
	}
	return why
}

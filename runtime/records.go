package runtime

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/m3o/m3o/internal/atomicfile"
)

// want is the desired state of a Ref, as recorded.
type want struct {
	Workload Workload
	Replicas int
}

// record is what is written of an instance before it is launched. It holds
// the app's environment, so only the owner may read it.
type record struct {
	ID       string
	Workload Workload
	Restarts int
	Ready    bool // it was ready when last heard of, so it may still be
	Last     Exit // how it last ended by itself
}

// records keep desired state and instances as one JSON file each, so that a
// driver killed at any moment finds on opening what it was doing. An empty dir
// keeps nothing.
type records struct{ dir string }

func (r records) open() (map[Ref]want, map[string]record, error) {
	wants, have := map[Ref]want{}, map[string]record{}
	if r.dir == "" {
		return wants, have, nil
	}
	for _, d := range []string{"want", "instances"} {
		if err := os.MkdirAll(filepath.Join(r.dir, d), 0o700); err != nil {
			return nil, nil, fmt.Errorf("make state directory: %w", err)
		}
	}
	err := each(filepath.Join(r.dir, "want"), func(path string, w want, err error) error {
		if err == nil {
			err = w.Workload.Validate()
		}
		if err != nil {
			return fmt.Errorf("record %s is damaged: %w", path, err)
		}
		wants[w.Workload.Ref] = w
		return nil
	})
	if err == nil {
		err = each(filepath.Join(r.dir, "instances"), func(path string, i record, err error) error {
			if err == nil {
				err = i.Workload.Validate()
			}
			if err != nil || i.ID+".json" != filepath.Base(path) {
				// A power cut can do this to a file that was not synced, and
				// then no instance is running either.
				return os.Remove(path)
			}
			have[i.ID] = i
			return nil
		})
	}
	return wants, have, err
}

// each reads every record of a directory; use is told what does not parse.
// What a crash left of a write is removed: its name begins with a dot.
func each[T any](dir string, use func(path string, v T, err error) error) error {
	es, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("list records: %w", err)
	}
	for _, e := range es {
		path := filepath.Join(dir, e.Name())
		if strings.HasPrefix(e.Name(), ".") {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("remove unfinished record: %w", err)
			}
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("read record: %w", err)
		}
		var v T
		err = json.Unmarshal(b, &v)
		if err := use(path, v, err); err != nil {
			return err
		}
	}
	return nil
}

// putWant records what is wanted, durably.
func (r records) putWant(w want) error {
	if r.dir == "" {
		return nil
	}
	b, err := json.Marshal(w)
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	if err := atomicfile.Write(filepath.Join(r.dir, "want", w.Workload.file()+".json"), b, 0o600); err != nil {
		return fmt.Errorf("record %s: %w", w.Workload.Ref, err)
	}
	return nil
}

// putInstance records an instance. It must survive us, not the machine, on
// which no instance would run any more, so it is not synced: that can take
// longer than all the rest of a start.
func (r records) putInstance(i record) error {
	if r.dir == "" {
		return nil
	}
	b, err := json.Marshal(i)
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	path := filepath.Join(r.dir, "instances", i.ID+".json")
	tmp := filepath.Join(r.dir, "instances", "."+i.ID)
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return errors.Join(fmt.Errorf("record instance: %w", err), os.Remove(tmp))
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("record instance: %w", err)
	}
	return nil
}

func (r records) remove(kind, name string) error {
	if r.dir == "" {
		return nil
	}
	err := os.Remove(filepath.Join(r.dir, kind, name+".json"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove record: %w", err)
	}
	return nil
}

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
	err := each(filepath.Join(r.dir, "want"), func(w want) error {
		wants[w.Workload.Ref] = w
		return w.Workload.Validate()
	})
	if err == nil {
		err = each(filepath.Join(r.dir, "instances"), func(i record) error {
			have[i.ID] = i
			return i.Workload.Validate()
		})
	}
	return wants, have, err
}

// each reads every record of a directory. What a crash left of a write is
// removed: its name begins with a dot.
func each[T any](dir string, use func(T) error) error {
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
		if err := json.Unmarshal(b, &v); err != nil {
			return fmt.Errorf("record %s is damaged: %w", path, err)
		}
		if err := use(v); err != nil {
			return fmt.Errorf("record %s: %w", path, err)
		}
	}
	return nil
}

func (r records) put(kind, name string, v any) error {
	if r.dir == "" {
		return nil
	}
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	if err := atomicfile.Write(filepath.Join(r.dir, kind, name+".json"), b, 0o600); err != nil {
		return fmt.Errorf("record %s: %w", name, err)
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

package main

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/m3o/m3o/daemon"
)

// report prints what m3od doctor found and returns the exit code: 1 when
// something has to be mended.
func report(w io.Writer, found []daemon.Finding, asJSON bool) int {
	code := 0
	for _, f := range found {
		if f.State == daemon.CheckFail {
			code = 1
		}
	}
	if asJSON {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		if enc.Encode(found) != nil {
			return 1
		}
		return code
	}
	for _, f := range found {
		fmt.Fprintf(w, "%-4s  %-9s  %s\n", f.State, f.Check, f.Msg)
		if f.Hint != "" {
			fmt.Fprintf(w, "%17s%s\n", "", f.Hint)
		}
	}
	return code
}

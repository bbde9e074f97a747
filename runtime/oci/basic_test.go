//go:build linux

package oci_test

import (
	"context"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/m3o/m3o/runtime"
	"github.com/m3o/m3o/runtime/oci"
)

func shutdown(d *oci.Driver) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return d.Shutdown(ctx)
}

func TestAnswersThroughItsVeth(t *testing.T) {
	r := newRig(t)
	d, end := r.serve(t)
	defer func() {
		end()
		if err := shutdown(d); err != nil {
			t.Error(err)
		}
	}()
	ref := runtime.Ref{App: "hello", Process: "web", Release: 1}
	for range 3 {
		t0 := time.Now()
		if err := d.Start(t.Context(), runtime.Workload{Ref: ref, Image: r.image, Args: []string{"/server", "serve"}, Port: 8080}, 1); err != nil {
			t.Fatal(err)
		}
		ins, err := runtime.WaitReady(t.Context(), d, ref, 1, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Log("ready", time.Since(t0))
		resp, err := http.Get("http://" + ins[0].Addr)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		t.Log(string(b), err)
		t0 = time.Now()
		if err := d.Stop(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
		t.Log("stopped", time.Since(t0))
	}
}

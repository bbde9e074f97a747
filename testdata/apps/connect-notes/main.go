// Connect-notes is a Connect service: it speaks gRPC, gRPC-Web and Connect by
// itself. Neither the messages nor the handlers' glue are in the repository.
package main

import (
	"context"
	"errors"
	"log"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"connectrpc.com/connect"

	padv1 "example.com/connect-notes/gen/pad/v1"
	"example.com/connect-notes/gen/pad/v1/padv1connect"
)

func main() {
	mux := http.NewServeMux()
	mux.Handle(padv1connect.NewPadHandler(pad{}))
	srv := &http.Server{Addr: ":" + os.Getenv("PORT"), Handler: mux, Protocols: new(http.Protocols)}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	context.AfterFunc(ctx, func() { _ = srv.Shutdown(context.Background()) })
	if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		log.Fatal(err)
	}
}

type pad struct{}

var _ padv1connect.PadHandler = pad{}

func (pad) Write(_ context.Context, r *connect.Request[padv1.WriteRequest]) (*connect.Response[padv1.WriteResponse], error) {
	return connect.NewResponse(&padv1.WriteResponse{Text: strings.ToUpper(r.Msg.GetText())}), nil
}

func (pad) Letters(_ context.Context, r *connect.Request[padv1.LettersRequest], out *connect.ServerStream[padv1.LettersResponse]) error {
	for _, l := range r.Msg.GetText() {
		if err := out.Send(&padv1.LettersResponse{Letter: string(l)}); err != nil {
			return err
		}
	}
	return nil
}

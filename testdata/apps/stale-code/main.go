// Stale-code has generated code that is older than its .proto file.
package main

import (
	"context"
	"log"
	"net"
	"os"
	"strings"

	"google.golang.org/grpc"

	echov1 "example.com/stale-code/proto/echo/v1"
)

func main() {
	ln, err := net.Listen("tcp", ":"+os.Getenv("PORT"))
	if err != nil {
		log.Fatal(err)
	}
	s := grpc.NewServer()
	echov1.RegisterEchoServer(s, echo{})
	log.Fatal(s.Serve(ln))
}

type echo struct{ echov1.UnimplementedEchoServer }

func (echo) Say(_ context.Context, r *echov1.SayRequest) (*echov1.SayResponse, error) {
	return &echov1.SayResponse{Text: strings.TrimSpace(strings.Repeat(r.GetText()+" ", max(1, int(r.GetTimes()))))}, nil
}

func (e echo) Shout(ctx context.Context, r *echov1.SayRequest) (*echov1.SayResponse, error) {
	said, err := e.Say(ctx, r)
	if err != nil {
		return nil, err
	}
	return &echov1.SayResponse{Text: strings.ToUpper(said.GetText())}, nil
}

// Buf-module greets. Its .proto files are a buf module, and buf.gen.yaml says
// where Go code goes and with which options: nothing of it is in the
// repository. The service has no embedded Unimplemented type, which only
// compiles with the option that buf.gen.yaml sets.
package main

import (
	"context"
	"log"
	"net"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/reflection"

	greetv1 "example.com/buf-module/internal/gen/greet/v1"
)

func main() {
	ln, err := net.Listen("tcp", ":"+os.Getenv("PORT"))
	if err != nil {
		log.Fatal(err)
	}
	s := grpc.NewServer()
	greetv1.RegisterGreetServiceServer(s, greeter{})
	reflection.Register(s)
	log.Fatal(s.Serve(ln))
}

type greeter struct{}

func (greeter) Greet(_ context.Context, r *greetv1.GreetRequest) (*greetv1.GreetResponse, error) {
	word := map[greetv1.Language]string{greetv1.Language_LANGUAGE_FRENCH: "Bonjour"}[r.GetLanguage()]
	if word == "" {
		word = "Hello"
	}
	return &greetv1.GreetResponse{Greeting: word + " " + r.GetName()}, nil
}

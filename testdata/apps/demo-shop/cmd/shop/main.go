// Command shop serves the catalogue, the carts and the checkout.
package main

import (
	"context"
	"log"
	"net"
	"os"
	"os/signal"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"example.com/demo-shop/internal/shop"
	shopv1 "example.com/demo-shop/proto/shop/v1"
)

func main() {
	ln, err := net.Listen("tcp", ":"+os.Getenv("PORT"))
	if err != nil {
		log.Fatal(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	s := grpc.NewServer()
	catalog, carts := shop.NewCatalog(), shop.NewCarts()
	shopv1.RegisterCatalogServer(s, catalog)
	shopv1.RegisterCartServer(s, carts)
	shopv1.RegisterCheckoutServer(s, shop.NewCheckout(catalog, carts))
	healthpb.RegisterHealthServer(s, health.NewServer())
	context.AfterFunc(ctx, s.GracefulStop)
	if err := s.Serve(ln); err != nil {
		log.Fatal(err)
	}
}
